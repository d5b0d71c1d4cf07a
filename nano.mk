# Nano's trainings, from nothing to the files of packages/aiprod-nano (docs/nano.md). Each can be
# stopped and started again; the model card says how long each took.
TRAINER := OMP_NUM_THREADS=1 $(BIN)/python -m aiprod_trainer
TEXT_ENCODER := packages/aiprod-nano/src/aiprod_nano/text_encoder

.PHONY: nano nano-first nano-codecs nano-transformer nano-upscaler nano-distilled nano-reward \
	nano-temporal nano-cameras nano-controls nano-tiny-decoder nano-variants

nano: nano-first nano-codecs nano-transformer nano-upscaler nano-temporal nano-distilled nano-reward \
	nano-cameras nano-controls nano-tiny-decoder ## train nano from nothing, all of it

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

nano-codecs: $(VENV)/run.stamp ## train nano: its video codec on, at 64 and 128 pixels, then in world v2
	mkdir -p runs/v1
	$(TRAINER).train_video_codec configs/nano/video_codec_two_sizes.yaml --out runs/v1/video_codec
	$(TRAINER).export codecs --video runs/v1/video_codec --sound-of runs/first/nano-dev.safetensors \
		--out runs/v1/codecs.safetensors
	$(TRAINER).train_video_codec configs/nano/video_codec_two_worlds.yaml --out runs/video_codec
	$(TRAINER).export codecs --video runs/video_codec --sound-of runs/first/nano-dev.safetensors \
		--out runs/codecs.safetensors

PREPARE := $(TRAINER).prepare_world --text-encoder $(TEXT_ENCODER) --checkpoint

CAMERAS := static dolly-in dolly-out dolly-left dolly-right jib-up jib-down

# Each training sees the parts that are there when it starts.
nano-transformer: $(VENV)/run.stamp ## train nano: its transformer on, with many words, at two sizes, in two worlds
	$(PREPARE) runs/codecs.safetensors --out runs/latents/64 --clips 4096 --captions 6 --seed 31
	$(PREPARE) runs/codecs.safetensors --out runs/latents/128 --size 128 --clips 3072 --captions 4 --seed 51
	$(TRAINER).train_base configs/nano/transformer_two_sizes.yaml --out runs/transformer
	$(TRAINER).export model --codecs runs/codecs.safetensors --transformer runs/transformer \
		--generation configs/nano/generation.yaml --out runs/v1/nano-dev.safetensors
	for camera in $(CAMERAS); do \
		$(PREPARE) runs/codecs.safetensors --out runs/latents/v2/$$camera --world v2 --size 128 \
			--only camera="$$(echo $$camera | tr - ' ')" --clips 256 --captions 6 --seed 71 || exit 1; done
	$(TRAINER).train_base configs/nano/transformer_two_worlds.yaml --out runs/transformer_two_worlds
	mkdir -p runs/v2 runs/nano && cp -r $(TEXT_ENCODER) runs/nano/
	$(TRAINER).export model --codecs runs/codecs.safetensors --transformer runs/transformer_two_worlds \
		--share 0.6 --generation configs/nano/generation.yaml --out runs/v2/nano-dev.safetensors
	$(PREPARE) runs/codecs.safetensors --out runs/latents/cameras/64 --clips 2560 --captions 8 --seed 131
	$(PREPARE) runs/codecs.safetensors --out runs/latents/cameras/64-v2 --world v2 --clips 3328 --captions 8 --seed 171
	$(PREPARE) runs/codecs.safetensors --out runs/latents/cameras/128 --size 128 --clips 1024 --captions 6 --seed 151
	$(TRAINER).train_base configs/nano/transformer_cameras.yaml --out runs/transformer_cameras
	$(TRAINER).train_vocoder configs/nano/vocoder_level.yaml --out runs/vocoder_level
	$(TRAINER).export model --codecs runs/codecs.safetensors --transformer runs/transformer_cameras \
		--vocoder runs/vocoder_level --share 0.8 --generation configs/nano/generation.yaml \
		--out runs/nano/nano-dev.safetensors

nano-upscaler: $(VENV)/run.stamp ## train nano: its spatial upscaler
	$(TRAINER).train_upsampler configs/nano/spatial_upscaler.yaml --out runs/spatial
	$(TRAINER).export upsampler --run runs/spatial \
		--out runs/nano/nano-spatial-upscaler-x2.safetensors

nano-temporal: $(VENV)/run.stamp ## train nano: its temporal upscaler
	$(TRAINER).train_upsampler configs/nano/temporal_upscaler.yaml --out runs/temporal
	$(TRAINER).export upsampler --run runs/temporal \
		--out runs/nano/nano-temporal-upscaler-x2.safetensors

nano-distilled: $(VENV)/run.stamp ## train nano: its distilled LoRA, 8 steps without guidance
	OMP_NUM_THREADS=1 $(BIN)/aiprod distill configs/nano/distill.yaml \
		--set model=runs/nano/nano-dev.safetensors --set latents=runs/latents
	cp runs/distill/*-distilled-lora-64.safetensors runs/nano/nano-distilled-lora-64.safetensors

nano-reward: $(VENV)/run.stamp ## train nano: the reward model that judges latents
	OMP_NUM_THREADS=1 $(BIN)/aiprod reward train configs/nano/reward.yaml \
		--set model=runs/nano/nano-dev.safetensors
	cp runs/reward/nano-reward.safetensors runs/nano/

# More clips before what hides a move: a shift along bricks or stripes hardly shows.
HIDES_dolly-in := hills
HIDES_dolly-out := hills curtain
HIDES_dolly-left := brick hills
HIDES_jib-up := curtain
HIDES_jib-down := curtain
# A LoRA of so few steps turns the camera too little; the strength that turns it enough becomes its 1.
STRENGTH_dolly-in := 1.5
STRENGTH_dolly-out := 1.8
STRENGTH_dolly-left := 1.5
STRENGTH_dolly-right := 1.8
STRENGTH_jib-up := 1.4
STRENGTH_jib-down := 1.8

# To the left took longest: at the others' length it turned .63 of prompts that had not chosen its strength.
CLIPS_dolly-left := 512
LONGER_dolly-left := --set optimization.steps=1000 --set optimization.batch_size=12

nano-cameras: $(addprefix nano-camera-,$(CAMERAS)) ## train nano: a LoRA for each camera move

nano-camera-%: $(VENV)/run.stamp
	for background in any $(HIDES_$*); do \
		$(PREPARE) runs/nano/nano-dev.safetensors --out runs/cameras/$*/$$background --world v2 \
			--only camera="$(subst -, ,$*)" $$([ $$background = any ] || echo --only background=$$background) \
			--clips $(or $(CLIPS_$*),256) --captions 6 --seed 91 || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/aiprod train configs/nano/lora_camera.yaml $(LONGER_$*) \
		--set model.model_path=runs/nano/nano-dev.safetensors \
		--set data.preprocessed_data_root=runs/cameras/$* \
		--set output_dir=runs/nano-lora-camera-control-$*
	$(TRAINER).export lora --run runs/nano-lora-camera-control-$* --strength $(or $(STRENGTH_$*),1) \
		--out runs/nano/nano-lora-camera-control-$*.safetensors

# Each starts where the one before ended: to sharpen a blurred clip teaches a LoRA to read what it is
# shown, from which depth, pose and edges are a smaller step than from nothing.
nano-controls: $(VENV)/run.stamp ## train nano: IC-LoRAs that follow a blurred clip, depth, a pose, edges
	$(PREPARE) runs/nano/nano-dev.safetensors --out runs/controls/v1 --clips 512 --captions 4 \
		--references canny depth pose detailer --seed 21
	start="--set optimization.steps=150"; for kind in detailer depth-control pose-control canny-control; do \
		OMP_NUM_THREADS=1 $(BIN)/aiprod train configs/nano/ic_lora.yaml \
			--set model.model_path=runs/nano/nano-dev.safetensors $$start \
			--set training_strategy.reference_latents_dir=reference_$${kind%-control} \
			--set output_dir=runs/nano-ic-lora-$$kind && \
		cp $$(ls -d runs/nano-ic-lora-$$kind/checkpoints/step-* | tail -1)/lora.safetensors \
			runs/nano/nano-ic-lora-$$kind.safetensors || exit 1; \
		start="--set model.load_checkpoint=runs/nano-ic-lora-$$kind"; done

nano-tiny-decoder: $(VENV)/run.stamp ## train nano: its decoder for previews
	$(TRAINER).train_tiny_decoder configs/nano/tiny_decoder.yaml --out runs/tiny_decoder
	cp runs/tiny_decoder/nano-tiny-decoder.safetensors runs/nano/

nano-variants: $(VENV)/run.stamp ## make of the shipped nano: nano-dev-fp8, nano-distilled, nano-distilled-fp8
	rm -f $(addprefix packages/aiprod-nano/src/aiprod_nano/nano-,$(addsuffix .safetensors,dev-fp8 distilled distilled-fp8))
	$(BIN)/aiprod models convert nano packages/aiprod-nano/src/aiprod_nano --variant dev-fp8 \
		--variant distilled --variant distilled-fp8
