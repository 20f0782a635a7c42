"""What a hint does to a policy, measured before training: `trace-opd probe`.

measure.py measures, probe.py does so for an annotated dataset, regions.py turns the figures into a
preset, page.py prints them. The study measures its bases with measure.py too.
"""
