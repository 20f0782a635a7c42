"""The stages as plain functions over the store, their engines, and the command line."""
