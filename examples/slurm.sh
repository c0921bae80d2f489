#!/bin/bash
# A training run as a Slurm job that survives preemption and its own time limit:
#
#   sbatch examples/slurm.sh train_text_to_image.py --pretrained_model_name_or_path MODEL --output_dir OUT …
#
# Told to stop, by the queue or shortly before its time is up, it lets the script finish the step and write a
# checkpoint, asks to be queued again, and continues there, with as many machines and GPUs as it is given then.
# --output_dir must lie on a disk that all machines share. ACCELERATE_CONFIG=examples/fsdp2.yaml, set before sbatch,
# launches as that file says.
#
#SBATCH --job-name=text-to-image
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

set -u

machines=${SLURM_JOB_NUM_NODES:-1}
processes=$((machines * ${SLURM_GPUS_ON_NODE:-1}))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a machine

# Seconds that the launcher leaves the script for its checkpoint before it kills it; fewer than in --signal above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

if [[ $1 == *flax* ]]; then
    # One process drives all GPUs of a machine; asked by itself, JAX would give it the first one only.
    export JAX_COORDINATOR_ADDRESS=$first:$port JAX_NUM_PROCESSES=$machines
    # shellcheck disable=SC2016 # it is the task's shell that knows the machine's number
    launch=(bash -c 'JAX_PROCESS_ID=$SLURM_NODEID exec python "$@"' --)
elif ((processes == 1)); then
    # Without a launcher: accelerate's ends at SIGTERM before the script has, and Slurm then kills what is left.
    launch=(python "$1")
    [[ -n ${ACCELERATE_CONFIG:-} ]] || launch+=(--mixed_precision "${PRECISION:-bf16}")
    shift
else
    launch=(accelerate launch)
    if [[ -n ${ACCELERATE_CONFIG:-} ]]; then
        launch+=(--config_file "$ACCELERATE_CONFIG")
    else
        launch+=(--multi_gpu --mixed_precision "${PRECISION:-bf16}")
    fi
    launch+=(--num_machines "$machines" --num_processes "$processes")
    launch+=(--main_process_ip "$first" --main_process_port "$port")
    # shellcheck disable=SC2016 # as above
    launch=(bash -c 'exec "${@:1:2}" --machine_rank "$SLURM_NODEID" "${@:3}"' -- "${launch[@]}")
fi

stop=
# scancel signals the steps and not this shell. srun itself, sent SIGTERM, would have them killed soon after.
trap 'stop=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun --kill-on-bad-exit=1 "${launch[@]}" "$@" --resume_from_checkpoint latest &
step=$!
while :; do # a signal ends `wait` before the step has ended
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [[ -n $stop && $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
