"""Contracts: tables, labels and configs, and how they are read. Every other room imports them."""
