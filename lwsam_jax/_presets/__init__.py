"""Published methods, one a file: each returns a `Method`."""
