"""The commands of `lwsam-bench`: what each one's arguments are and stand for."""
