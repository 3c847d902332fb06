"""One run, from data to its published record, and what a practitioner takes away from it."""
