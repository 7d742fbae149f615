"""How well a method selects: benches with known answers, methods, scores, and their runner."""
