"""Where a run spends its time, out of the file that `--trace FILE.json` writes.

    python benches/trace.py trace.json [LEAST]

Prints seconds and how often for spans of the program, of requests to its workers and of what workers do, from LEAST
seconds on (0.2 unless told). Spans hold those inside them.
"""
import collections
import json
import pathlib
import sys


def events(path):
    """The spans of a trace, which need not have been written to its end."""
    lines = pathlib.Path(path).read_text().splitlines()[1:]
    return [json.loads(line.rstrip(",")) for line in lines if line.endswith(",")]


def name_of(event):
    """Without numbers, so that `batch 1` and `batch 2` are one."""
    return " ".join(word for word in event["name"].split() if not any(c.isdigit() for c in word))


def main():
    least = float(sys.argv[2]) if len(sys.argv) > 2 else 0.2
    seconds, count = collections.Counter(), collections.Counter()
    for event in events(sys.argv[1]):
        key = event["cat"], name_of(event)
        seconds[key] += event["dur"] / 1e6
        count[key] += 1
    for category in ["program", "request", "worker"]:
        print(category)
        for (own, name), time in seconds.most_common():
            if own == category and time >= least:
                print(f"  {time:8.2f} s {count[own, name]:6d}  {name}")


if __name__ == "__main__":
    main()
