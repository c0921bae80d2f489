# `make quickstart` and `make test` are all a newcomer needs; each makes the environment in .venv first.
PYTHON ?= python3
BIN = .venv/bin
OUT = quickstart-output

.PHONY: setup quickstart test test-slow lint clean

setup: .venv/ready

.venv/ready: requirements.txt requirements_dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements_dev.txt
	touch $@

# Real handwritten digits, a tiny base model, the first script as a user starts it, and a look at the result.
# Stopped half-way it continues when it is called again; `make clean` makes it start over.
quickstart: export TRANSFORMERS_VERBOSITY = error
quickstart: setup
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/digits
	$(BIN)/python quickstart/make_base.py --output_dir $(OUT)/base
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process 2 train_text_to_image.py \
	  --pretrained_model_name_or_path $(OUT)/base --train_data_dir $(OUT)/digits --output_dir $(OUT)/model \
	  --resolution 32 --train_batch_size 64 --max_train_steps 800 --seed 42 --caption_dropout 0.1 \
	  --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 50 \
	  --validation_prompts "a handwritten three" "a handwritten seven" --validation_steps 200 \
	  --validation_guidance_scale 3 --checkpointing_steps 200 --checkpoints_total_limit 2 \
	  --resume_from_checkpoint latest
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/model --grid $(OUT)/digits.png

test: setup lint
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(OUT)
