"""A picture that follows a given sound: speech, music, footsteps.

from aiprod_pipelines.a2vid_two_stage import AudioToVideoPipeline

pipeline = AudioToVideoPipeline.from_model("ltx-2-19b-dev.safetensors")
clip = pipeline("a woman sings in a small club", audio="song.wav", audio_start_time=12.5)
clip.save("clip.mp4")

The sound is cut to the clip's length, or followed by silence where it is shorter; the clip carries
it as it was given, not as the model would decode it. Every video pipeline takes `audio`; this one
insists on it.
"""

from aiprod_pipelines.flags import main
from aiprod_pipelines.ti2vid_two_stages import TI2VidTwoStagesPipeline


class AudioToVideoPipeline(TI2VidTwoStagesPipeline):
    """Two stages with the sound frozen in both: the picture is guided, the sound is not."""

    name = "audio-to-video"
    needs = frozenset({"audio"})


if __name__ == "__main__":
    main(AudioToVideoPipeline)
