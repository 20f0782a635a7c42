"""The method inside other trainers: TRL's GRPO trainer (trl.py). Top room, like flows.py.

Nothing of the package imports this folder, and each file needs the package that it is named after.
"""
