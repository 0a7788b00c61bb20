"""Networks that tasks build: the GPT family and its mixture of experts; empty, since its settings load no torch."""
