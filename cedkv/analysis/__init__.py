"""From records to results: paired statistics, comparisons of conditions, findings."""
