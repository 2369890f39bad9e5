"""What runs a method: functional form, Optax, train step."""
