"""Data: formats, records, chat templates and masks, order."""
