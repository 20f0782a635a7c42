"""Studies: many training runs that differ in one thing, and a page of their results."""
