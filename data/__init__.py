"""Where problems come from (sources) and where artifacts live (the store)."""
