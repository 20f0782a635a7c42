"""Datasets and models of a store as repositories of the Hugging Face Hub; `trace-opd push` calls.

contents.py collects the files of a repository, cards.py writes its card, public.py leaves out of
both what belongs to a machine or an account, and upload.py sends them.
"""
