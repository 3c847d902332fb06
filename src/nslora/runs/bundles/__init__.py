"""What a bundle becomes: forms that other tools load, and a report to look at."""
