# `make quickstart` and `make test` are all a newcomer needs; each makes the environment in .venv first.
PYTHON ?= python3
BIN = .venv/bin
OUT = quickstart-output
WORKERS = 2

.PHONY: setup quickstart quickstart-lora quickstart-sdxl quickstart-flax compare test test-slow lint clean

setup: .venv/ready

.venv/ready: requirements.txt requirements_flax.txt requirements_dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements_flax.txt -r requirements_dev.txt
	touch $@

LAUNCH = $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process 2
TRAIN = --resolution 32 --train_batch_size 64 --max_train_steps 800 --seed 42 --caption_dropout 0.1 \
  --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 50 --validation_steps 200 \
  --validation_guidance_scale 3 --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest
KEEP_LATENTS = --cache_latents --encoding_cache_dir $(OUT)/encodings
KEEP = $(KEEP_LATENTS) --cache_text_embeddings
TRAIN_LORA = $(TRAIN) $(KEEP_LATENTS) --rank 32 --train_text_encoder \
  --validation_prompt "a mirrored handwritten three"
RUNS = quickstart quickstart-lora quickstart-sdxl quickstart-flax compare
$(RUNS): export TRANSFORMERS_VERBOSITY = error
# accelerate's launcher imports the DeepSpeed that the tests need, which warns where it has to find out that this is a CPU.
$(RUNS): export DS_ACCELERATOR = cpu

# Real handwritten digits, a tiny base model, the first script as a user starts it, and a look at the result.
# Stopped half-way it continues when it is called again; `make clean` makes it start over.
quickstart: setup
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/digits
	$(BIN)/python quickstart/make_base.py --output_dir $(OUT)/base
	$(LAUNCH) train_text_to_image.py \
	  --pretrained_model_name_or_path $(OUT)/base --train_data_dir $(OUT)/digits --output_dir $(OUT)/model \
	  $(TRAIN) $(KEEP) --validation_prompts "a handwritten three" "a handwritten seven"
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/model --grid $(OUT)/digits.png

# A word that the quickstart's model does not know, learned as adapters: "a mirrored handwritten three".
quickstart-lora: quickstart
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/mirrored --mirrored
	$(LAUNCH) train_text_to_image_lora.py \
	  --pretrained_model_name_or_path $(OUT)/model --train_data_dir $(OUT)/mirrored --output_dir $(OUT)/lora \
	  $(TRAIN_LORA)
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/model --lora_dir $(OUT)/lora --mirrored --grid $(OUT)/lora.png

# The same two steps with the layout of Stable Diffusion XL: the digits, and then the new word as adapters.
quickstart-sdxl: setup
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/digits
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/mirrored --mirrored
	$(BIN)/python quickstart/make_base.py --output_dir $(OUT)/sdxl-base --sdxl
	$(LAUNCH) train_text_to_image_sdxl.py \
	  --pretrained_model_name_or_path $(OUT)/sdxl-base --train_data_dir $(OUT)/digits --output_dir $(OUT)/sdxl \
	  $(TRAIN) $(KEEP) --validation_prompt "a handwritten three"
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/sdxl --grid $(OUT)/sdxl.png
	$(LAUNCH) train_text_to_image_lora_sdxl.py \
	  --pretrained_model_name_or_path $(OUT)/sdxl --train_data_dir $(OUT)/mirrored --output_dir $(OUT)/sdxl-lora \
	  $(TRAIN_LORA)
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/sdxl --lora_dir $(OUT)/sdxl-lora --mirrored \
	  --grid $(OUT)/sdxl-lora.png

# The digits once more, trained in JAX; the result is drawn from, and scored, with torch.
quickstart-flax: setup
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/digits
	$(BIN)/python quickstart/make_base.py --output_dir $(OUT)/base
	$(BIN)/python train_text_to_image_flax.py \
	  --pretrained_model_name_or_path $(OUT)/base --train_data_dir $(OUT)/digits --output_dir $(OUT)/flax-model \
	  $(TRAIN) $(KEEP) --validation_prompts "a handwritten three" "a handwritten seven" --dataloader_num_workers 1 \
	  --compilation_cache_dir $(OUT)/compiled
	$(BIN)/python quickstart/score.py --model_dir $(OUT)/flax-model --grid $(OUT)/flax.png

# The digits under several settings: the tables and charts of docs/settings.md.
compare: setup
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/digits
	$(BIN)/python quickstart/make_data.py --output_dir $(OUT)/mirrored --mirrored
	$(BIN)/python quickstart/make_base.py --output_dir $(OUT)/base
	$(BIN)/python quickstart/compare.py --base $(OUT)/base --digits $(OUT)/digits --mirrored $(OUT)/mirrored \
	  --output_dir $(OUT)/compare --charts docs

# JAX's tests have processes of their own: torch's data workers are forked, which JAX's threads do not go well with.
test: setup lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --ignore-glob "tests/test_flax*"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/test_flax*.py

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(OUT)
