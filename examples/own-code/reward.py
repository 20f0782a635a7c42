"""Half the reward for a number of the right length. The manual: RewardFunction in
pipelines/verifiers/own_reward.py.
"""

import re


def closeness(response, answer, right_length=0.5):
    found = re.findall(r"\\boxed\{(\d+)\}", response)
    if not found:
        return {"reward": 0.0, "feedback": "no number in a box"}
    if found[-1] == answer:
        return 1.0
    return right_length if len(found[-1]) == len(answer) else 0.0
