"""Studies: many training runs with one thing changed, and the page that tells what came out."""
