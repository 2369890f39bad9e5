"""The command `report`: all tables and figures of a folder on one page."""
