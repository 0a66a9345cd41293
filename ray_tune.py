"""Search the thresholds and schedules of a data set, without labels if it has none.

python ray_tune.py --dataset furballs                                                 # small, on this CPU
python ray_tune.py --dataset lsun_horse --data shards/horse --num-trials 32 --gpus-per-trial 1
python ray_tune.py --resume runs/sweep-NAME
"""

from data_shards.command import run_command

from pipeline.studies.sweep.command import main

if __name__ == "__main__":
    run_command(main)
