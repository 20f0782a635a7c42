"""Paid answers of chat endpoints: each is asked for once, journalled, counted and budgeted.

Annotators and judges use it. questions.py has what they exchange, requests.py sends.
"""
