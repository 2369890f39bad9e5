"""The training runs behind the paper's tables: what is missing is trained."""
