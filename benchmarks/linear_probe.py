# SPDX-License-Identifier: Apache-2.0
"""What pretrained features tell by themselves: a linear layer on frozen maps, pretrained against random ones.

    python -m benchmarks.linear_probe --data TASK_FOLDER --weights runs/pretraining_small/checkpoints/weights.pt

Both probes train on the same scans, the training half of the study's split, and are scored on its test set.
"""

import argparse
from pathlib import Path

import torch

from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.segmentation.msd import read_dataset
from medaccel.segmentation.probe import linear_probe
from medaccel.segmentation.protocol import split_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a task in the Decathlon's layout")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="of pretrainings; one seed each")
    parser.add_argument("--feature_size", type=int, default=12)
    parser.add_argument("--levels", nargs="+", help="maps that the layer sees; by default those of the probe")
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.data)
    settings = {"levels": arguments.levels} if arguments.levels else None
    for seed, weights in enumerate(arguments.weights):
        split = split_cases([case.name for case in dataset.cases], seed)
        found = {}
        for name in ("random", "pretrained"):
            torch.manual_seed(seed)
            net = SwinUNETR(in_channels=1, out_channels=2, feature_size=arguments.feature_size)
            if name == "pretrained":
                load_pretrained(net, weights)
            found[name] = 100 * linear_probe(net, dataset, split.training, split.test, settings)
        print(
            f"{weights}: Dice {found['pretrained']:.1f} with pretrained features, {found['random']:.1f} with random "
            f"ones: {found['pretrained'] - found['random']:+.1f} points ({len(split.training)} scans to train on, "
            f"{len(split.test)} to test)",
            flush=True,
        )


if __name__ == "__main__":
    main()
