"""What every room uses: errors, rows in files, progress, provenance, caches."""
