"""Greedy generation with a decoder's caches and without them: generate.py MODEL.onnx [TOKENS]

Prints the tokens with caches on the first line and those without on the second. Caches start empty, and what comes out
as present.N.* goes in as past_key_values.N.* again; without caches the whole text runs every time.
"""

import sys

import numpy as np
import onnxruntime


def main(path, count="12"):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    outputs = [o.name for o in session.get_outputs()]
    empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in pasts}

    def run(tokens, caches):
        found = dict(zip(outputs, session.run(None, {"input_ids": np.array([tokens], np.int64), **caches})))
        following = {name: found[name.replace("past_key_values", "present")] for name in caches}
        return int(found["logits"][0, -1].argmax()), following

    start = [5, 17, 42]
    tokens, caches = list(start), empty
    token, caches = run(start, caches)
    for _ in range(int(count)):
        tokens.append(token)
        token, caches = run([token], caches)
    print(*tokens)
    tokens = list(start)
    for _ in range(int(count)):
        tokens.append(run(tokens, empty)[0])
    print(*tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
