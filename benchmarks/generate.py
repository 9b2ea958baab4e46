"""The same prompts answered by weitiao and by transformers.generate, in turn, each in a process of its own.

    python benchmarks/generate.py --data dev_instruct.jsonl [--rows 64] [--max-new-tokens 128] [--rounds 2]
                                  [--precision fp32 bf16] [--run RUN] [--stops] [--rows-at-once N]

Greedy answers of smollm2-135m, or of a run that was trained (--run), to the first rows. transformers: model.generate with 16 rows
at a time, padded to the left, rows of like length together (in the order of the file it is slower). --stops: each answer ends
where the row's own does, as a trained model's would; without it an untrained model hardly ever stops. transformers' batch then
goes on to its longest row, as it does when rows stop by themselves.

Printed: rows/s and new tokens/s by the processor's time, peak resident memory of the whole process, and how many texts are the
same. Where one is not, the smallest gap between the two likeliest tokens up to the first difference is printed: below 1e-4 it is
rounding that decides.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

MODEL, BATCH, TIE = "smollm2-135m", 16, 1e-4


def job_of(args):
    """(model, template, prompts, the most new tokens of each, autocast)"""
    from contextlib import nullcontext

    from weitiao import config
    from weitiao.screen import Screen, quiet_libraries
    from weitiao.train.evaluation import longest_answer, questions

    quiet_libraries()
    screen = Screen(quiet=True)
    if args.run:
        from weitiao.settings.data import Source
        from weitiao.use.trained import open_trained

        trained = open_trained(args.run, screen)
        rows, template, model, autocast = trained.read([Source(path=args.data)]).rows, trained.template, trained.model, trained.autocast
    else:
        from weitiao.train.train import prepare

        settings = config.read(None, [f"training.precision={args.precision[0]}", "evaluation.every=end"],
                               **{"model.name": MODEL, "data.train": args.data})
        job = prepare(settings, screen)
        rows, template, autocast = job.data.rows, job.template, nullcontext
        model = job.model.merge_and_unload().eval()  # the plain model
    asked = questions(rows[: args.rows])
    prompts = [template.prompt_ids(q.messages, q.tools) for q in asked]
    own = [len(template.tokenizer(q.reference, add_special_tokens=False).input_ids) + 1 for q in asked]
    most = args.max_new_tokens or longest_answer(template, asked)
    return model, template, prompts, [min(n, most) if args.stops else most for n in own], autocast


def by_weitiao(model, template, prompts, limits, args):
    from weitiao.model.decode import decode
    from weitiao.model.generate import ROWS, Choice, Sampling, answering, virtual_now

    with answering(model):
        choice = Choice(Sampling(), None, prompts)
        found = dict(decode(model, prompts, limits, template.stop_ids, choice, args.rows_at_once or ROWS, virtual_now(model)))
    return [found[i] for i in range(len(prompts))]


def by_transformers(model, template, prompts, limits, args):
    import numpy as np
    import torch

    from weitiao.model.generate import answering

    found = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with answering(model):
        for batch in (order[k : k + BATCH] for k in range(0, len(order), BATCH)):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), template.pad_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i].astype(np.int64))
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(limits[i] for i in batch), do_sample=False, temperature=None,
                top_p=None, top_k=None, eos_token_id=template.stop_ids, pad_token_id=template.pad_id,
            )[:, width:].tolist()
            for i, new in zip(batch, out, strict=True):
                ends = [k + 1 for k, token in enumerate(new) if token in template.stop_ids]
                found[i] = new[: min([*ends, limits[i]])]
    return [found[i] for i in range(len(prompts))]


WAYS = {"weitiao": by_weitiao, "transformers": by_transformers}


def work(args) -> None:
    if args.way == "transformers":  # as it multiplies in a program of its own
        from weitiao.model import products

        products.is_quicker = lambda: False
    model, template, prompts, limits, autocast = job_of(args)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    with autocast():
        found = WAYS[args.way](model, template, prompts, limits, args)
    print(json.dumps({
        "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loaded": start / 2**20,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "ids": found,
    }))


def gaps(args, ours, theirs) -> list[float]:
    """For each row that differs: the smallest gap of the two likeliest tokens up to the first difference, all in one forward."""
    import numpy as np
    import torch

    model, _, prompts, _, autocast = job_of(args)
    found = []
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a != b:
            same = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            ids = torch.from_numpy(np.concatenate([prompt, a[:same]]).astype(np.int64))[None]
            with torch.inference_mode(), autocast():
                top = model(input_ids=ids).logits[0, len(prompt) - 1 :].float().topk(2).values
            found.append(float((top[:, 0] - top[:, 1]).min()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--stops", action="store_true")
    parser.add_argument("--rows-at-once", type=int)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        work(args)
        return
    given = [w for flag, value in (("--run", args.run), ("--max-new-tokens", args.max_new_tokens), ("--rows-at-once", args.rows_at_once))
             if value for w in (flag, str(value))] + (["--stops"] if args.stops else [])
    for precision in ["run"] if args.run else args.precision:
        results: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--data", args.data, "--rows", str(args.rows), "--precision", precision, "--way", way, *given]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\n{precision}: {args.rows} rows")
        for way, found in results.items():
            cpu, new = statistics.median(r["cpu"] for r in found), sum(map(len, found[0]["ids"]))
            print(f"  {way:13} {args.rows / cpu:6.2f} rows/s {new / cpu:7.1f} new tokens/s of the processor ({new} tokens; "
                  f"{cpu:.1f} s, wall {statistics.median(r['wall'] for r in found):.1f} s), peak {max(r['peak'] for r in found):.2f} GiB, "
                  f"loaded {found[0]['loaded']:.2f} GiB")
        ratio = statistics.median(r["cpu"] for r in results["transformers"]) / statistics.median(r["cpu"] for r in results["weitiao"])
        ours, theirs = (results[way][0]["ids"] for way in WAYS)
        args.precision = [precision]
        differ = gaps(args, ours, theirs)
        print(f"  weitiao is {ratio:.2f} times as fast; {len(ours) - len(differ)} of {len(ours)} texts are the same; the others had a "
              f"smallest gap of {', '.join(f'{g:.1e}' for g in differ) or '-'} (a tie is < {TIE})")


if __name__ == "__main__":
    main()
