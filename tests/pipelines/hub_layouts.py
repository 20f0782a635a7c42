"""Benchmarks of the suite `paper` in the layouts that they have on the hub, with easy problems."""

import csv
import json
from pathlib import Path


def write_benchmarks(folder: Path) -> None:
    """Write a folder for each dataset id, three problems each; `load_dataset` reads such folders
    below the working folder before it asks the hub.
    """
    sums = [(f"{n}1+{n}3", str(20 * n + 4)) for n in (1, 2, 3)]
    jsonl = {
        "HuggingFaceH4/MATH-500/test.jsonl": "problem",
        "HuggingFaceH4/aime_2024/data/train-00000-of-00001.jsonl": "problem",
        "math-ai/aime25/test.jsonl": "problem",
        "math-ai/amc23/test-00000-of-00001.jsonl": "question",
    }
    for path, column in jsonl.items():
        file = folder / path
        file.parent.mkdir(parents=True)
        rows = [{column: text, "answer": answer, "solution": "s"} for text, answer in sums]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpqa = folder / "Idavidrein" / "gpqa"
    gpqa.mkdir(parents=True)
    with (gpqa / "gpqa_diamond.csv").open("w", newline="") as file:
        names = [f"Incorrect Answer {number}" for number in (1, 2, 3)]
        writer = csv.DictWriter(file, ["Question", "Correct Answer", "Explanation", *names])
        writer.writeheader()
        for text, answer in sums:
            wrong = {name: f"{at}" for at, name in enumerate(names)}
            writer.writerow({"Question": text, "Correct Answer": answer, "Explanation": ""} | wrong)
    (gpqa / "README.md").write_text(
        "---\nconfigs:\n- config_name: gpqa_diamond\n  data_files:\n  - split: train\n"
        "    path: gpqa_diamond.csv\n---\n"
    )
