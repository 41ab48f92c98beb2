"""Prints some synthetic dialogues, or writes a file of them for `python train.py --data`."""
import json
import time

from data import machine
from data.synthetic import SPLITS, generate


def main():
    with machine.errors_in_one_line("lower --n"):
        parser = machine.Parser("Print some synthetic dialogues, or write a file of them.")
        parser.add_argument("--jsonl", default="", help="the file to write, one dialogue a line")
        parser.add_argument("--split", default="train", choices=SPLITS, help="(default: train)")
        parser.add_argument("--n", type=int, default=12, help="how many (default: 12)")
        parser.add_argument("--seed", type=int, default=None, help="(default: the time)")
        s = parser.parse_args()
        seed = time.time() if s.seed is None else s.seed
        dialogues = generate(s.split, s.n, seed, mixed=True)
        if s.jsonl:
            with open(s.jsonl, "w", encoding="utf-8") as file:
                for dialogue in dialogues:
                    file.write(json.dumps({"messages": dialogue["messages"]}) + "\n")
            return
        for dialogue in dialogues:
            print(f"--- {dialogue['family']}")
            for message in dialogue["messages"]:
                print(f"{message['role']:>9}: {message['content']}")


if __name__ == "__main__":
    main()
