"""Memory, time and traffic of a run on paper. Every figure here is a prediction."""
