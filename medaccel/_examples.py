# SPDX-License-Identifier: Apache-2.0
"""Holds the examples that end each command's --help."""

SMOOTH_EXAMPLES = """examples:
  medaccel smooth pet.nii.gz smooth.nii.gz --fwhm 5
  medaccel smooth ct.nii ct_smooth.nii.gz --sigma "[1, 1, 2]"
  medaccel smooth dicom_folder/ suv_smooth.nii.gz --sigma 2 --unit voxel --force
"""

DOCTOR_EXAMPLES = """examples:
  medaccel doctor
"""

INFO_EXAMPLES = """examples:
  medaccel info pet_series/
  medaccel info ct.nii.gz
"""

VERIFY_EXAMPLES = """examples:
  medaccel verify
  medaccel verify --devices cuda:0 --json verify.json
"""

RUN_EXAMPLES = """examples:
  medaccel restoration run
  medaccel restoration run --config configs/restoration_small.yaml
  medaccel restoration run --config configs/restoration_small.yaml --resume
  medaccel restoration run --train_studies my_studies --methods gaussian1 swin_unetr --output runs/mine
  torchrun --nproc-per-node 4 -m medaccel.cli restoration run --config configs/restoration_full.yaml
"""

SCORE_EXAMPLES = """examples:
  medaccel restoration score runs/restoration
  medaccel restoration score runs/restoration --dicom path/to/pet_series --realisations 10
  medaccel restoration score runs/restoration --dicom path/to/pet_series --truth tv
  medaccel restoration score runs/restoration --name more --curve_seconds "[10, 30, 45]" --observer_phantoms 4
  medaccel restoration score runs/restoration --test_studies held_out --methods gaussian1
"""

APPLY_EXAMPLES = """examples:
  medaccel restoration apply pet_60s.nii.gz restored.nii.gz
  medaccel restoration apply dicom_folder/ derived_dicom/ --seconds 30
  medaccel restoration apply --checkpoint gaussian_mix.pt pet_60s.nii.gz restored.nii.gz
  medaccel restoration apply --checkpoint swin_unetr.pt dicom_folder/ derived_dicom/ --ct ct_dicom/
  medaccel restoration apply dicom_folder/ derived_dicom/ --deidentify true
  medaccel restoration apply --checkpoint diffusion_conditional.pt study/ restored.nii.gz --seconds 30 --samples 8
"""

PRETRAINING_EXAMPLES = """examples:
  medaccel pretraining run --config configs/pretraining_small.yaml
  medaccel pretraining run --scans LUNA16 my_cts --preset nvidia --output runs/nvidia
  medaccel pretraining run --config configs/pretraining_small.yaml --trainer.steps 1000 --resume
  torchrun --nproc-per-node 4 -m medaccel.cli pretraining run --config configs/pretraining_full.yaml
"""

SEGMENTATION_EXAMPLES = """examples:
  medaccel segmentation run --config configs/segmentation_small.yaml
  medaccel segmentation run --config configs/segmentation_small.yaml --jobs 2 \\
      --select "{task: [spleen], fraction: [0.2], init: [random, instance_pixel]}"
  medaccel segmentation run --config study.yaml --backend dask --scheduler tcp://10.0.0.1:8786 --jobs 8
  medaccel segmentation run --config study.yaml --cell $SLURM_ARRAY_TASK_ID
"""

SEGMENT_EXAMPLES = """examples:
  medaccel segmentation apply --checkpoint cells/spleen-random-020-seed0/best.pt ct.nii.gz spleen.nii.gz
  medaccel segmentation apply --checkpoint best.pt ct_dicom/ spleen.nii.gz --keep_largest 1 --report volume.json
  medaccel segmentation apply --checkpoint lungs.pt ct_dicom/ seg.dcm --output_type dicom_seg --ratio lesion/lung
"""

DEMO_EXAMPLES = """examples:
  medaccel demo
  medaccel demo --output demo_run --force
"""

WEIGHTS_EXAMPLES = """examples:
  medaccel weights list
  medaccel weights path pet_restoration
  medaccel weights get NAME --from-file copy.pt
"""

VALIDATE_EXAMPLES = """examples:
  medaccel restoration validate study/
  medaccel restoration validate my_studies/ --model mine.pt --methods "[nlm]" --output runs/validation
"""

FINETUNE_EXAMPLES = """examples:
  medaccel restoration finetune my_studies/ mine.pt
  medaccel restoration finetune my_studies/ mine.pt --target_seconds 120 --steps 400 --nested false
"""
