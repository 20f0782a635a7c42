"""People mark responses in Label Studio: tasks for it, and its exports as annotations datasets."""
