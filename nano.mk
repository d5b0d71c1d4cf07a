# Nano's trainings, from nothing to the files of packages/aiprod-nano (docs/nano.md). Each can be
# stopped and started again; the model card says how long each took.
TRAINER := OMP_NUM_THREADS=1 $(BIN)/python -m aiprod_trainer
TEXT_ENCODER := packages/aiprod-nano/src/aiprod_nano/text_encoder

.PHONY: nano nano-first nano-codecs nano-transformer nano-upscaler nano-distilled nano-canny \
	nano-tiny-decoder

nano: nano-first nano-codecs nano-transformer nano-upscaler nano-distilled nano-canny nano-tiny-decoder ## train nano from nothing, all of it

nano-first: $(VENV)/run.stamp ## train nano: codecs, vocoder and transformer from nothing, at 64 pixels
	$(TRAINER).train_video_codec configs/nano/video_codec.yaml --out runs/first/video_codec
	$(TRAINER).train_audio_codec configs/nano/audio_codec.yaml --out runs/first/audio_codec
	$(TRAINER).train_vocoder configs/nano/vocoder.yaml --out runs/first/vocoder
	$(TRAINER).export codecs --video runs/first/video_codec --audio runs/first/audio_codec \
		--vocoder runs/first/vocoder --out runs/first/codecs.safetensors
	$(TRAINER).prepare_world --checkpoint runs/first/codecs.safetensors \
		--text-encoder $(TEXT_ENCODER) --out runs/first/latents --clips 4608
	$(TRAINER).train_base configs/nano/transformer.yaml --out runs/first/transformer \
		--set codecs=runs/first/codecs.safetensors --set latents=runs/first/latents \
		--set held_out=null
	$(TRAINER).export model --codecs runs/first/codecs.safetensors --transformer runs/first/transformer \
		--generation configs/nano/generation.yaml --out runs/first/nano-dev.safetensors

nano-codecs: $(VENV)/run.stamp ## train nano: its video codec on, at 64 and 128 pixels
	$(TRAINER).train_video_codec configs/nano/video_codec_two_sizes.yaml --out runs/video_codec
	$(TRAINER).export codecs --video runs/video_codec --sound-of runs/first/nano-dev.safetensors \
		--out runs/codecs.safetensors

nano-transformer: $(VENV)/run.stamp ## train nano: its transformer on, with many words, at two sizes
	$(TRAINER).prepare_world --checkpoint runs/codecs.safetensors \
		--text-encoder $(TEXT_ENCODER) --out runs/latents/64 --clips 4096 --captions 6 --seed 31
	$(TRAINER).prepare_world --checkpoint runs/codecs.safetensors --size 128 \
		--text-encoder $(TEXT_ENCODER) --out runs/latents/128 --clips 3072 --captions 4 --seed 51
	$(TRAINER).train_base configs/nano/transformer_two_sizes.yaml --out runs/transformer
	$(TRAINER).export model --codecs runs/codecs.safetensors --transformer runs/transformer \
		--generation configs/nano/generation.yaml --out runs/nano/nano-dev.safetensors
	cp -r $(TEXT_ENCODER) runs/nano/

nano-upscaler: $(VENV)/run.stamp ## train nano: its spatial upscaler
	$(TRAINER).train_upsampler configs/nano/spatial_upscaler.yaml --out runs/spatial
	$(TRAINER).export upsampler --run runs/spatial \
		--out runs/nano/nano-spatial-upscaler-x2.safetensors

nano-distilled: $(VENV)/run.stamp ## train nano: its distilled LoRA, 8 steps without guidance
	OMP_NUM_THREADS=1 $(BIN)/aiprod distill configs/nano/distill.yaml \
		--set model=runs/nano/nano-dev.safetensors --set latents=runs/latents

nano-canny: $(VENV)/run.stamp ## train nano: its IC-LoRA that follows edges
	$(TRAINER).prepare_world --checkpoint runs/nano/nano-dev.safetensors \
		--text-encoder $(TEXT_ENCODER) --out runs/controls --clips 512 --captions 4 --references canny --seed 21
	OMP_NUM_THREADS=1 $(BIN)/aiprod train configs/nano/ic_lora.yaml \
		--set model.model_path=runs/nano/nano-dev.safetensors

nano-tiny-decoder: $(VENV)/run.stamp ## train nano: its decoder for previews
	$(TRAINER).train_tiny_decoder configs/nano/tiny_decoder.yaml --out runs/tiny_decoder
	cp runs/tiny_decoder/nano-tiny-decoder.safetensors runs/nano/
