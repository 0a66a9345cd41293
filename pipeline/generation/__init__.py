"""What a trained run makes."""
