"""From rows to tables, plots and pages; rows are all that is known here."""
