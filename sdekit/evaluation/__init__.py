"""Is it right, and how good: checks of processes, scores and rules, comparisons, distances between samples and data."""
