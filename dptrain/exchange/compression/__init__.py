"""How gradients are put into fewer digits, or fewer numbers, and back."""
