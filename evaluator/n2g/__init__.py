"""Family `n2g`: explanations as n-grams."""
