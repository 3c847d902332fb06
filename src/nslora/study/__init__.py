"""From records to statistics, verdicts, figures and tables; without torch."""
