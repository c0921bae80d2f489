#!/bin/bash
# A training run as a Slurm job that survives preemption and its own time limit:
#
#   sbatch examples/slurm.sh train_text_to_image.py --pretrained_model_name_or_path MODEL --output_dir OUT …
#
# Activate the environment before sbatch. When the queue stops the job, or shortly before its time limit, the script
# finishes the step and writes a checkpoint. The job then queues itself again, and continues from that checkpoint on as
# many machines and GPUs as it gets. --output_dir must be on a disk that all machines share. If ACCELERATE_CONFIG is set
# before sbatch, for example to examples/fsdp2.yaml, the job launches as that file says.
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

# After this many seconds the launcher kills the script. The script needs them for its checkpoint; --signal above gives
# a few more.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

if [[ $1 == *flax* ]]; then
    # One process drives all GPUs of a machine. By itself, JAX would use only the first one under Slurm.
    export JAX_COORDINATOR_ADDRESS=$first:$port JAX_NUM_PROCESSES=$machines
    # shellcheck disable=SC2016 # only the shell of the task knows the machine's number
    launch=(bash -c 'JAX_PROCESS_ID=$SLURM_NODEID exec python "$@"' --)
elif ((processes == 1)); then
    # Without a launcher: accelerate's launcher ends at SIGTERM before the script does, and Slurm then kills the script.
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
