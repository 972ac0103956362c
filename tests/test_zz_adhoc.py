import json
from hub_server import run_script
from tiny_processor import *
from video_files import write_video
from d2vlm_hf.model.pipeline_d2vlm import VideoGroundingPipeline
def test_x(hub, tmp_path):
    v=write_video(tmp_path/"a.mp4",25)
    p=tiny_processor(); m=model_for(p,evidence_threshold=.97)
    VideoGroundingPipeline(model=m,processor=p,device="cpu").save_pretrained(tmp_path/"ck")
    out=run_script(f"""
import d2vlm_hf
from transformers import pipeline
pipe=pipeline("video-grounding",model={str(tmp_path/'ck')!r},device="cpu")
pipe.push_to_hub("org/tiny")
""",hub)
    out2=run_script(f"""
from transformers import pipeline, AutoProcessor, AutoModel
AutoProcessor.from_pretrained("org/tiny",trust_remote_code=True)
pipe=pipeline("video-grounding",model="org/tiny",trust_remote_code=True,device="cpu")
pipe.save_pretrained({str(tmp_path/'again')!r})
print(type(pipe)); print(type(pipe.processor).__module__, type(pipe.model).__module__)
print(pipe({v!r},question="When does it?",max_new_tokens=8))
""",hub,block=("d2vlm_hf","torchvision"))
    print(out2.stdout[-800:])
    out3=run_script(f"""
import d2vlm_hf
from transformers import pipeline, AutoProcessor, AutoModel
pipe=pipeline("video-grounding",model="org/tiny",device="cpu")
pipe.save_pretrained({str(tmp_path/'again2')!r})
print(type(pipe)); 
print(pipe({v!r},question="When does it?",max_new_tokens=8))
""",hub)
    print(out3.stdout[-800:])
    for n in ("again","again2"):
        for f in ("config.json","processor_config.json"):
            t=json.loads((tmp_path/n/f).read_text()); print(n,f,t["auto_map"],t.get("custom_pipelines"), t.get("video_processor",{}).get("auto_map"), t.get("_name_or_path"))
    assert 0
