"""What the Prefect flows of flows.py need that needs no Prefect."""
