# SPDX-License-Identifier: Apache-2.0
"""Probes pretrained features against random ones: a linear layer on frozen maps.

    python -m benchmarks.linear_probe --data TASK_FOLDER --weights runs/pretraining_small/checkpoints/weights.pt

Both probes train on the same scans, the training half of the study's split, and are scored on its test set. Each is
trained twice: on the map that the pixel contrast trains, and on all maps together. All maps hold so many random
functions of the image that a linear layer finds much in them without any pretraining.
"""

import argparse
from pathlib import Path

import torch

from medaccel.data.msd import read_dataset
from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.segmentation.evaluation.probe import PROBE, linear_probe
from medaccel.segmentation.protocol import split_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a task in the Decathlon's layout")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="of pretrainings; one seed each")
    parser.add_argument("--feature_size", type=int, default=12)
    parser.add_argument("--levels", nargs="+", help="maps that the layer sees, instead of the two choices")
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.data)
    choices = [arguments.levels] if arguments.levels else [["decoder2"], PROBE["levels"]]
    for seed, weights in enumerate(arguments.weights):
        split = split_cases([case.name for case in dataset.cases], seed)
        for levels in choices:
            found = {}
            for name in ("random", "pretrained"):
                torch.manual_seed(seed)
                net = SwinUNETR(in_channels=1, out_channels=2, feature_size=arguments.feature_size)
                if name == "pretrained":
                    load_pretrained(net, weights)
                found[name] = 100 * linear_probe(net, dataset, split.training, split.test, {"levels": levels})
            print(
                f"{weights}, {' '.join(levels)}: Dice {found['pretrained']:.1f} with pretrained features, "
                f"{found['random']:.1f} with random ones: {found['pretrained'] - found['random']:+.1f} points "
                f"({len(split.training)} scans to train on, {len(split.test)} to test)",
                flush=True,
            )


if __name__ == "__main__":
    main()
