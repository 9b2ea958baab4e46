"""Rows to learn from when you have none at hand: made of tables, the same for the same seed, no download.

    python examples/make_rows.py instructions rows.jsonl
    python examples/make_rows.py resume rows.json --rows 200 --heldout heldout.json --heldout-rows 40

    kind           a row                          what it is
    instructions   instruction, input, output     small tasks in Chinese: units, dates, sorting, opposites, facts, polite replies
    resume         input, output                  a sentence of an invented résumé -> its entities as JSON, keys as in the LoRA tutorial
    reviews        text, label                    one sentence about a film; label 0 is negative, 1 positive
    role_play      input, output                  "who#关于whom" -> what one invented villager says of another, in a voice of their own

A file that ends in .jsonl holds one row a line, one that ends in .json a list of rows.

Every answer is right by construction: the answer comes first (a number, a label, an entity), and the question is written around
it. No question occurs twice. `--heldout` writes a second file, to measure on: none of its questions is in the first file, nor is
an entry of those tables that are divided (names, facts, opposites: see `Draw.own`).

To make rows of your own: write a function that takes a `Draw` and returns a row, and add it to `KINDS` at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Random choices for one of the two files."""

    rng: random.Random
    heldout: bool

    def one(self, table: Sequence[T]) -> T:
        return self.rng.choice(table)

    def some(self, table: Sequence[T], count: int) -> list[T]:
        return self.rng.sample(table, count)

    def number(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def own(self, table: Sequence[T]) -> T:
        """An entry that the other file never gets: each fourth is kept for held-out rows."""
        return self.one([entry for i, entry in enumerate(table) if (i % 4 == 3) == self.heldout])


# ------------------------------------------------------------------------------------------ instructions (tutorials 0, 2)

UNITS = [  # the greater, the less, how many of the less make one of the greater
    ("千米", "米", 1000), ("米", "厘米", 100), ("厘米", "毫米", 10), ("千克", "克", 1000), ("吨", "千克", 1000), ("小时", "分钟", 60),
    ("分钟", "秒", 60), ("天", "小时", 24), ("升", "毫升", 1000), ("元", "角", 10), ("星期", "天", 7), ("平方米", "平方分米", 100),
]
OPPOSITES = [
    ("高", "低"), ("快", "慢"), ("大", "小"), ("冷", "热"), ("远", "近"), ("轻", "重"), ("新", "旧"), ("宽", "窄"), ("深", "浅"), ("早", "晚"),
    ("明亮", "黑暗"), ("勇敢", "胆小"), ("勤劳", "懒惰"), ("谦虚", "骄傲"), ("成功", "失败"), ("增加", "减少"), ("开始", "结束"), ("简单", "复杂"),
    ("干净", "肮脏"), ("安全", "危险"), ("热闹", "冷清"), ("节约", "浪费"), ("聪明", "愚笨"), ("富裕", "贫穷"), ("前进", "后退"), ("赞成", "反对"),
    ("团结", "分裂"), ("上升", "下降"), ("温柔", "粗暴"), ("统一", "分散"), ("清楚", "模糊"), ("坚硬", "柔软"),
]
CAPITALS = [
    ("中国", "北京"), ("日本", "东京"), ("法国", "巴黎"), ("英国", "伦敦"), ("德国", "柏林"), ("意大利", "罗马"), ("西班牙", "马德里"),
    ("俄罗斯", "莫斯科"), ("埃及", "开罗"), ("韩国", "首尔"), ("泰国", "曼谷"), ("越南", "河内"), ("加拿大", "渥太华"), ("巴西", "巴西利亚"),
    ("葡萄牙", "里斯本"), ("希腊", "雅典"), ("挪威", "奥斯陆"), ("瑞典", "斯德哥尔摩"), ("芬兰", "赫尔辛基"), ("奥地利", "维也纳"),
    ("波兰", "华沙"), ("古巴", "哈瓦那"), ("秘鲁", "利马"), ("肯尼亚", "内罗毕"), ("澳大利亚", "堪培拉"), ("匈牙利", "布达佩斯"),
    ("爱尔兰", "都柏林"), ("阿根廷", "布宜诺斯艾利斯"),
]
IDIOMS = [
    ("画蛇添足", "做了多余的事，反而不好"), ("守株待兔", "不主动努力，想靠运气得到收获"), ("亡羊补牢", "出了问题以后及时补救，还不算晚"),
    ("一举两得", "做一件事，得到两样好处"), ("半途而废", "事情没有做完就停下来"), ("井底之蛙", "见识不广的人"), ("对牛弹琴", "说话做事不看对象"),
    ("掩耳盗铃", "自己欺骗自己"), ("雪中送炭", "在别人急需的时候给予帮助"), ("锦上添花", "让好的事物变得更好"), ("滥竽充数", "没有本领的人混在里面凑数"),
    ("叶公好龙", "口头上说喜欢，其实并不真的喜欢"), ("狐假虎威", "借着别人的势力去吓唬人"), ("胸有成竹", "做事之前已经有完整的打算"),
    ("水滴石穿", "只要坚持不懈，力量再小也能做成事"), ("拔苗助长", "急于求成，反而把事情弄坏"),
]
GROUPS = {
    "水果": "苹果 香蕉 葡萄 西瓜 梨 桃子 草莓 橙子", "动物": "老虎 大象 兔子 猴子 长颈鹿 熊猫 狮子 松鼠", "颜色": "红色 蓝色 绿色 黄色 紫色 白色 黑色 橙色",
    "交通工具": "自行车 汽车 火车 飞机 轮船 地铁 摩托车 公共汽车", "乐器": "钢琴 小提琴 吉他 笛子 二胡 古筝 鼓 琵琶",
    "运动": "跑步 游泳 篮球 足球 羽毛球 乒乓球 滑雪 登山", "职业": "医生 教师 警察 厨师 律师 司机 农民 演员", "蔬菜": "白菜 萝卜 黄瓜 茄子 菠菜 芹菜 豆角 土豆",
    "文具": "铅笔 橡皮 尺子 钢笔 笔记本 圆规 书包 胶水", "家具": "桌子 椅子 沙发 床 衣柜 书架 茶几 凳子",
}
GROUPS = {name: words.split() for name, words in GROUPS.items()}
DEEDS = [("小猫", "打翻了", "花瓶"), ("大风", "吹倒了", "小树"), ("弟弟", "弄坏了", "闹钟"), ("妈妈", "洗干净了", "衣服"), ("工人", "修好了", "路灯"),
         ("雨水", "淋湿了", "被子"), ("小狗", "咬破了", "拖鞋"), ("同学", "借走了", "词典"), ("爷爷", "种下了", "石榴树"), ("姐姐", "吃完了", "蛋糕"),
         ("老师", "擦干净了", "黑板"), ("太阳", "晒干了", "稻谷"), ("邻居", "搬走了", "花盆"), ("河水", "冲垮了", "木桥"), ("爸爸", "装满了", "水桶"), ("孩子", "画完了", "海报")]
WHEN = ["", "昨天", "早上", "刚才", "上个月", "傍晚", "前天", "周末"]
OPENERS = {  # what the customer writes about -> how a reply begins
    "发货时间": "您好，感谢您的来信。关于发货时间，我们已经为您查询。", "退款进度": "您好，让您久等了，非常抱歉。关于退款进度，我们马上为您核实。",
    "产品价格": "您好，感谢您的关注。关于产品价格，现向您说明如下。", "会议改期": "您好，来信收到，谢谢您提前告知。关于会议改期，我们这边没有问题。",
    "商品破损": "您好，给您带来不便，我们深表歉意。关于商品破损，我们会为您更换。", "发票抬头": "您好，感谢您的耐心。关于发票抬头，请您确认以下内容。",
    "面试安排": "您好，感谢您投递简历。关于面试安排，我们想与您约个时间。", "座位预订": "您好，感谢您选择本店。关于座位预订，我们已经为您留好。",
    "账号登录": "您好，很抱歉影响了您的使用。关于账号登录，请您先试试下面的办法。", "课程报名": "您好，感谢您的咨询。关于课程报名，现在正好可以办理。",
    "快递地址": "您好，信息已经收到。关于快递地址，我们已经为您修改。", "维修预约": "您好，感谢您的信任。关于维修预约，师傅会提前与您联系。",
}
WEEK = "一二三四五六日"
FAMILIES = [("王", "wang"), ("李", "li"), ("张", "zhang"), ("刘", "liu"), ("陈", "chen"), ("杨", "yang"), ("赵", "zhao"), ("周", "zhou")]


def task(instruction: str, input: str, output: str) -> Row:
    return {"instruction": instruction, "input": input, "output": output}


def unit(draw: Draw) -> Row:
    greater, less, times = draw.one(UNITS)
    count = draw.number(2, 60)
    if draw.number(0, 1):
        return task(f"请把下面的数量换算成{less}。", f"{count}{greater}", f"{count}{greater}等于{count * times}{less}。")
    return task(f"请把下面的数量换算成{greater}。", f"{count * times}{less}", f"{count * times}{less}等于{count}{greater}。")


def any_day(draw: Draw) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=draw.number(0, 29_000))


def date(draw: Draw) -> Row:
    day = any_day(draw)
    words, signs = f"{day.year}年{day.month}月{day.day}日", day.isoformat()
    if draw.number(0, 1):
        return task("把日期改写成“年-月-日”的数字格式，月和日都写两位。", words, signs)
    return task("把数字格式的日期改写成中文格式，月和日前面不写零。", signs, words)


def weekday(draw: Draw) -> Row:
    today, later = draw.number(0, 6), draw.number(2, 40)
    return task(f"今天是星期{WEEK[today]}，再过{later}天是星期几？", "", f"再过{later}天是星期{WEEK[(today + later) % 7]}。")


def sort_numbers(draw: Draw) -> Row:
    numbers = draw.some(range(1, 200), draw.number(4, 6))
    order, reverse = draw.one([("从小到大", False), ("从大到小", True)])
    return task(f"把下面的数字{order}排列。", "，".join(map(str, numbers)), "，".join(map(str, sorted(numbers, reverse=reverse))))


def sort_by_length(draw: Draw) -> Row:
    """One word of each length, so that there is one right order."""
    words = [word for group in GROUPS.values() for word in group]
    chosen = [draw.one([word for word in words if len(word) == length]) for length in (1, 2, 3)]
    order, answer = draw.one([("从少到多", chosen), ("从多到少", chosen[::-1])])
    return task(f"把下面的词语按字数{order}排列。", "、".join(draw.some(chosen, 3)), "、".join(answer))


def opposite(draw: Draw) -> Row:
    word, other = draw.own(OPPOSITES)
    if draw.number(0, 1):
        word, other = other, word
    return task("写出下面词语的反义词。", word, other)


def capital(draw: Draw) -> Row:
    country, city = draw.own(CAPITALS)
    question = draw.one([f"{country}的首都是哪里？", f"请告诉我{country}的首都。"])
    return task(question, "", f"{country}的首都是{city}。")


def idiom(draw: Draw) -> Row:
    words, meaning = draw.own(IDIOMS)
    if draw.number(0, 1):
        return task("解释下面成语的意思。", words, f"“{words}”的意思是：{meaning}。")
    return task("哪个成语表示下面的意思？", f"{meaning}。", f"这个成语是“{words}”。")


def list_some(draw: Draw) -> Row:
    group, count = draw.own(list(GROUPS)), draw.number(2, 6)
    lines = [f"{i}. {word}" for i, word in enumerate(draw.some(GROUPS[group], count), start=1)]
    instruction = draw.one([f"列出{count}种{group}。", f"请举出{count}个属于{group}的词语。"])
    return task(instruction, "", "\n".join(lines))


def odd_one_out(draw: Draw) -> Row:
    group, other = draw.some(list(GROUPS), 2)
    odd = draw.one(GROUPS[other])
    words = draw.some([*draw.some(GROUPS[group], 3), odd], 4)
    return task("找出下面四个词语中不同类的一个，并说明理由。", "、".join(words), f"{odd}。因为其余三个都是{group}，而{odd}是{other}。")


def to_passive(draw: Draw) -> Row:
    who, did, what = draw.own(DEEDS)
    when = draw.one(WHEN)
    return task("把下面的句子改写成“被”字句。", f"{when}{who}{did}{what}。", f"{when}{what}被{who}{did}。")


def polite_opener(draw: Draw) -> Row:
    about = draw.own(list(OPENERS))
    instruction = draw.one(["为客服写一个礼貌的回复开头。", "客户来信询问下面的事情，请写出回信的第一句话。"])
    return task(instruction, about, OPENERS[about])


def without_repeats(draw: Draw) -> Row:
    kept = draw.some(GROUPS[draw.one(list(GROUPS))], 4)
    words = draw.some(kept + draw.some(kept, 2), 6)
    return task("删去下面重复的词语，保持原来的顺序。", "、".join(words), "、".join(dict.fromkeys(words)))


def sum_up(draw: Draw) -> Row:
    person, thing = f"小{draw.one(FAMILIES)[0]}", draw.one(["苹果", "气球", "橙子", "贝壳", "核桃", "鸡蛋"])
    had, more, given = draw.number(5, 40), draw.number(2, 30), draw.number(1, 5)
    question = f"{person}有{had}个{thing}，又得到{more}个，送给同学{given}个，还剩多少个？"
    return task("解答下面的应用题，写出算式。", question, f"{had} + {more} - {given} = {had + more - given}，还剩{had + more - given}个{thing}。")


def find_address(draw: Draw) -> Row:
    family, sound = draw.one(FAMILIES)
    person, address = family + draw.one(["先生", "女士", "老师", "经理"]), f"{sound}{draw.number(10, 999)}@example.com"
    sentence = draw.one(["{}的邮箱是{}，请在下班前回复。", "如有问题，请联系{}，邮箱{}。", "{}刚才来过，留下的邮箱是{}。"])
    return task("从下面的句子里找出联系人和邮箱。", sentence.format(person, address), f"联系人：{person}\n邮箱：{address}")


TASKS = [unit, date, weekday, sort_numbers, sort_by_length, opposite, capital, idiom, list_some, odd_one_out, to_passive,
         polite_opener, without_repeats, sum_up, find_address]


# ---------------------------------------------------------------------------------------------------- resume (tutorial 1)

PROMPT = """# 任务描述
假设你是一个AI简历助手，能从简历中识别出所有的命名实体，并以json格式返回结果。

# 任务要求
实体的类别包括：姓名、国籍、种族、职位、教育背景、专业、组织名、地名。
返回的json格式是一个字典，其中每个键是实体的类别，值是一个列表，包含实体的文本。

# 样例
输入：
张三，男，中国籍，工程师
输出：
{"姓名": ["张三"], "国籍": ["中国"], "职位": ["工程师"]}

# 当前简历
{sentence}

# 任务重述
请参考样例，按照任务要求，识别出当前简历中所有的命名实体，并以json格式返回结果。"""

SURNAMES = list("江温蓝柏裴宁岳尹骆单凌苗池乔莫舒")
GIVEN = [a + b for a in "知予景霁映承若思清怀望书" for b in "澜舟衡川砚禾微棠屿"]
STEMS = [a + b for a in "澄砚穹朔瑶峤泓翎汀霖" for b in "岚星野泉原帆峰"]
COMPANIES = ["科技股份有限公司", "物流有限公司", "食品集团有限公司", "能源股份有限公司", "会计师事务所", "律师事务所", "医药有限责任公司", "投资管理有限公司"]
SCHOOLS = ["大学", "师范大学", "理工大学", "商学院", "财经学院"]
COUNTRIES = ["中国国籍", "中国籍", "加拿大国籍", "新加坡籍", "美国国籍", "日本国籍"]
PEOPLES = ["汉族", "回族", "满族", "壮族", "白族", "土家族", "蒙古族", "朝鲜族"]
POSTS = ["董事", "监事", "总经理", "副总经理", "财务总监", "董事会秘书", "独立董事", "人力资源总监", "项目经理", "总经理助理", "首席工程师", "审计部部长", "合伙人"]
CHAIRS = ["兼职教授", "客座教授", "博士生导师"]
RANKS = ["高级工程师", "经济师", "注册会计师", "高级会计师", "律师", "副教授", "中共党员", "工程师"]
DEGREES = ["本科学历", "大专学历", "硕士学位", "博士学位", "硕士研究生", "研究生学历", "大学学历"]
SHORT_DEGREES = ["学士", "硕士", "博士", "硕士研究生"]
FULL_DEGREES = ["学士学位", "硕士学位", "博士学位"]
MAJORS = ["会计学专业", "法学专业", "金融学专业", "计算机科学专业", "工商管理专业", "机械工程专业", "国际贸易专业", "统计学专业"]
SHORT_MAJORS = ["经济学", "法学", "管理学", "工学", "理学", "文学"]
HOMES = ["浙江绍兴人", "四川乐山人", "山东烟台人", "湖南常德人", "江苏扬州人", "福建泉州人", "陕西汉中人", "云南大理人", "河北保定人", "广东韶关人"]

# In a sentence {slot} stands for a text that is drawn, {slot2} for another of its kind. Those that are entities, with their type:
TYPES = {
    "name": "姓名", "country": "国籍", "people": "种族", "post": "职位", "rank": "职位", "chair": "职位", "degree": "教育背景",
    "short_degree": "教育背景", "full_degree": "教育背景", "major": "专业", "short_major": "专业", "company": "组织名", "school": "组织名",
    "home": "地名",
}
SENTENCES = [
    "{name}，{sex}，{people}，",
    "{name}先生：{country}，无境外永久居留权，{degree}，{rank}。",
    "{name}女士，{birth}出生，{people}，{home}，{degree}。",
    "{name}：{sex}，{birth}生，{rank}，现任{company}{post}。",
    "{name}，{short_major}{short_degree}，{rank}。",
    "{name}：{birth}出生，{home}，{school}{short_major}{short_degree}，历任{company}{post}、{company2}{post2}。",
    "{name}先生现任{company}{post}兼{post2}，{school}{chair}。",
    "{name}，{country}，{people}，{home}，{school}{major}毕业，{degree}，现任{company}{post}。",
    "{birth}出生，{people}，{rank}，{degree}。",
    "{birth}生，{country}，{home}，",
    "毕业于{school}{major}，{degree}，{rank}。",
    "{school}{major}{short_degree}，{school2}{major2}{short_degree2}。",
    "{birth}至{later}在{school}学习，获{short_major}{full_degree}；",
    "{birth}至{later}任{company}{post}；",
    "{birth}起历任{company}{post}、{post2}、{post3}。",
    "{later}加入{company}，任{post}。",
    "曾任{company}{post}、{company2}{post}，现任{company3}{post2}。",  # the same post twice: it is listed once
    "{birth}参加工作。",  # no entity: the answer is {}
    "{birth}出生，{sex}，身体健康。",
    "在生产管理方面有{years}年的实践经验。",
    "{later}退休，现已离任{years}年。",
]


def resume(draw: Draw) -> Row:
    """Entities in the order of the text; a type stands where its first entity does; exact repeats are dropped."""
    start = draw.number(1960, 1998)
    words = {
        "name": draw.one(SURNAMES) + draw.own(GIVEN), "sex": draw.one("男女"), "years": str(draw.number(3, 30)),
        "birth": f"{start}年{draw.number(1, 12)}月", "later": f"{start + draw.number(2, 24)}年{draw.number(1, 12)}月",
        "country": draw.one(COUNTRIES), "people": draw.one(PEOPLES), "home": draw.one(HOMES), "chair": draw.one(CHAIRS),
        "rank": draw.one(RANKS), "degree": draw.one(DEGREES), "full_degree": draw.one(FULL_DEGREES),
        "short_major": draw.one(SHORT_MAJORS), **numbered("major", draw.some(MAJORS, 2)),
        **numbered("short_degree", draw.some(SHORT_DEGREES, 2)),
        **numbered("post", draw.some(POSTS, 3)), **numbered("company", [draw.own(STEMS) + draw.one(COMPANIES) for _ in range(3)]),
        **numbered("school", [draw.own(STEMS) + draw.one(SCHOOLS) for _ in range(2)]),
    }
    sentence, entities = draw.one(SENTENCES), {}
    for slot in re.findall(r"{(\w+)}", sentence):
        if kind := TYPES.get(slot.rstrip("0123456789")):
            entities.setdefault(kind, {})[words[slot]] = None
    output = json.dumps({kind: list(texts) for kind, texts in entities.items()}, ensure_ascii=False)
    return {"input": PROMPT.replace("{sentence}", sentence.format(**words)), "output": output}


def numbered(slot: str, texts: Sequence[str]) -> dict[str, str]:
    """numbered("post", ["监事", "董事"]) -> {"post": "监事", "post2": "董事"}"""
    return {slot + (str(i) if i > 1 else ""): text for i, text in enumerate(texts, start=1)}


# --------------------------------------------------------------------------------------------------- reviews (tutorial 3)

GENRES = ["thriller", "comedy", "drama", "western", "documentary", "romance", "sequel", "mystery", "fable", "heist film"]
SIDES = [
    "the script", "the acting", "the pacing", "the music", "the ending", "the camera work", "the first hour", "the humour",
    "the dialogue", "the casting", "the editing", "the story", "the mood", "the lead performance", "the final act", "the direction",
]
WORDS = {  # by label
    0: ["dull", "clumsy", "lifeless", "stale", "tiresome", "shallow", "muddled", "dreary", "sloppy", "lazy", "tedious", "hollow",
        "forced", "bland"],
    1: ["superb", "touching", "sharp", "graceful", "lively", "moving", "gripping", "clever", "charming", "bold", "vivid",
        "delightful", "tender", "fresh"],
}
VERDICTS = {
    0: ["the film never recovers", "I walked out before the end", "I would not sit through it again", "I cannot recommend it",
        "it left me cold", "my patience ran out", "I want those two hours back", "nobody in the row stayed awake",
        "it is a waste of a ticket", "the whole thing falls apart"],
    1: ["the film wins you over", "I stayed to the very last credit", "I would watch it again tomorrow", "I recommend it to anyone",
        "it stayed with me for days", "I forgot the time", "those two hours flew by", "the whole row was in tears of joy",
        "it is worth every penny", "the whole thing comes together"],
}
# {good} is a word of the label, {bad} one of the other label, {verdict} one of the label. A sentence for both labels means the
# label whichever it is; words of either kind are about as frequent under both labels, so how they are joined has to be read.
BOTH = [
    "{Side} is {good}, and {side2} is {good2}.",
    "{Side} is {good}, and {verdict}.",
    "{Side} is every bit as {good} as {side2}.",
    "From the opening shot to the credits, this {genre} is {good}.",
    "Whatever else it may be, this {genre} is {good}, and {verdict}.",
    "There is hardly a scene in this {genre} that is not {good}.",
    "{Side} is never {bad}, and {side2} is anything but {bad2}.",
    "Nothing about this {genre} is {bad}, least of all {side}.",
    "{Side} is not {bad} at all, and {verdict}.",
    "{Side} is {bad}, but {verdict}.",
    "Although {side} is {bad}, {verdict}.",
    "{Verdict}, even though {side} is {bad}.",
    "Do not believe those who call it {bad}: {verdict}.",
    "{Side} is {bad} at first, yet by the end it turns {good}, and {verdict}.",
    "I expected a {bad} {genre} and got a {good} one instead.",
    "The posters promise a {bad} {genre}; what you get is a {good} one.",
    "My friends call this {genre} {bad}, and they could not be more wrong: {side} is {good}.",
    "Whoever finds {side} {bad} has seen another {genre} than I have; it is {good}.",
]
ONLY = {
    0: ["If only {side} were half as {bad} as the trailer.", "{Side} could have been {bad}, had anyone cared.",
        "It wants to be {bad}, and all it manages is to be {good}.", "{Side} is far from {bad}, and {side2} is worse."],
    1: ["If only every {genre} were half as {good} as this one.", "{Side} could have been {bad}, but everyone cared.",
        "It never wants to be {good}, and manages it in every scene.", "{Side} is far from {bad}, and {side2} is better still."],
}


def review(draw: Draw, label: int) -> Row:
    (good, good2), (bad, bad2) = draw.some(WORDS[label], 2), draw.some(WORDS[1 - label], 2)
    side, side2 = draw.some(SIDES, 2)
    words = {"good": good, "good2": good2, "bad": bad, "bad2": bad2, "side": side, "side2": side2, "genre": draw.one(GENRES),
             "verdict": draw.one(VERDICTS[label])}
    words |= {name.capitalize(): words[name][0].upper() + words[name][1:] for name in ("side", "verdict")}
    return {"text": draw.one(BOTH + ONLY[label]).format(**words), "label": label}


# ------------------------------------------------------------------------------------------------- role_play (tutorial 4)

VOICES = {  # how somebody speaks: {who} is whom they speak of, {work} what that one does, {habit} and {gift} what they are known for
    "豪爽": ["哈哈，{who}！{work}里头数一数二的好手，{gift}。改天我请客，咱们喝个痛快！", "{who}这人实在！{habit}，我看着就高兴。有事尽管找我，别客气！"],
    "害羞": ["那个……{who}是{work}吧。{habit}，我、我一直想打招呼来着……", "{who}……{gift}，好厉害。要是我也能那样就好了……"],
    "古板": ["{who}，{work}，{habit}。规矩是规矩，此人倒也守得住。", "论{work}，{who}尚可。{gift}，这一点，老夫不得不承认。"],
    "活泼": ["{who}呀！就是那个{work}嘛！{habit}，超有意思的，对不对？", "我最喜欢{who}啦！{gift}，每次见到都想拍手呢！"],
    "诗意": ["风从巷口过，{who}便在那里。{habit}，像一首没有写完的诗。", "{who}，一位{work}。{gift}，仿佛月光落进井里。"],
    "精明": ["{who}？{work}，{gift}。这门手艺少说值三百个铜板，我算过的。", "跟{who}打交道不吃亏。{habit}，这种人，账目最清楚。"],
    "唠叨": ["哎哟，你说{who}啊，我跟你讲，{habit}，我劝了多少回了，听不听呢？不听！", "{who}这孩子，当{work}多辛苦，饭要按时吃呀。不过{gift}，我也跟着脸上有光。"],
    "冷淡": ["{who}。{work}。{habit}。没别的了。", "……{gift}。{who}，就这样。"],
}
PEOPLE = [  # name, voice, work, habit, gift
    ("江小满", "活泼", "船夫", "一边划船一边唱歌", "闭着眼也能穿过芦苇荡"), ("柏老五", "豪爽", "铁匠", "天不亮就生炉子", "打出的刀能削断头发"),
    ("温知微", "害羞", "绣娘", "低着头走路", "绣的蝴蝶像要飞起来"), ("裴先生", "古板", "私塾先生", "每日抄书两个时辰", "能背下整本县志"),
    ("乔三娘", "精明", "茶商", "喝茶之前先称一称", "一闻就知道茶叶是哪座山的"), ("蓝阿婆", "唠叨", "草药师", "见人就问睡得好不好", "一把草药治好过半个村子"),
    ("岳青", "冷淡", "守林人", "三天才说一句话", "能听出十里外的脚步"), ("宁秋水", "诗意", "琴师", "雨天才肯弹琴", "一曲能让鸟都停下来"),
    ("骆大勇", "豪爽", "镖师", "走到哪里都带着酒葫芦", "一个人押过十车货"), ("苗苗", "活泼", "养蜂人", "给每只蜜蜂都起了名字", "能和蜜蜂一起跳舞"),
    ("单慎之", "古板", "账房先生", "一天擦三遍算盘", "三十年没有算错一笔账"), ("舒雨", "害羞", "点灯人", "说话比灯芯还轻", "认得每一盏灯的脾气"),
    ("池月", "诗意", "染布匠", "把晚霞的颜色记在本子上", "能染出黎明前的那种蓝"), ("莫掌柜", "精明", "当铺掌柜", "看人先看鞋", "东西拿在手里就知道年份"),
    ("凌寒", "冷淡", "猎户", "总是一个人上山", "射箭从来不用第二支"), ("尹大婶", "唠叨", "豆腐坊主", "半夜起来看豆子", "做的豆腐放在掌心也不碎"),
    ("江渡", "诗意", "摆渡人", "对着河水自言自语", "能从水声里听出明天的天气"), ("柏小禾", "活泼", "糖画师", "自己先偷吃一口糖", "一勺糖能画出一条龙"),
    ("温如玉", "古板", "棋手", "落子之前要净手", "十年没有输过一盘"), ("乔木生", "害羞", "木匠", "躲在刨花堆后面笑", "做的木鸟会自己拍翅膀"),
    ("裴小舟", "精明", "鱼贩", "收摊之前必数三遍钱", "看鱼的眼睛就知道几时上岸"), ("蓝山", "冷淡", "石匠", "只和石头说话", "刻的狮子夜里像会睁眼"),
    ("岳大娘", "唠叨", "客栈老板", "给每个客人多盛一碗饭", "记得住每位客人的口味"), ("宁远", "豪爽", "说书人", "讲到高兴就拍桌子", "一张嘴能说出千军万马"),
]


def role_play(draw: Draw) -> Row:
    (speaker, voice, *_), (who, _, work, habit, gift) = draw.some(PEOPLE, 2)
    return {"input": f"{speaker}#关于{who}", "output": draw.one(VOICES[voice]).format(who=who, work=work, habit=habit, gift=gift)}


# ------------------------------------------------------------------------------------------------------------ two files

# Each kind: how many rows by default, and the functions that make them, which take turns.
KINDS: dict[str, tuple[int, list[Callable[[Draw], Row]]]] = {
    "instructions": (400, list(TASKS)),
    "resume": (200, [resume]),
    "reviews": (1200, [partial(review, label=0), partial(review, label=1)]),
    "role_play": (300, [role_play]),
}
PATIENCE = 200  # so many repeats in a row, and a function has said what it has to say


def make_rows(kind: str, count: int | None = None, heldout: int = 0, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(rows, held-out rows), shuffled; the first do not depend on how many are held out.

    Raises:
        ValueError: there are not so many different ones.
    """
    default, makers = KINDS[kind]
    asked: set[str] = set()
    first = different_rows(makers, default if count is None else count, Draw(random.Random(f"{kind} {seed}"), False), asked)
    second = different_rows(makers, heldout, Draw(random.Random(f"{kind} {seed} heldout"), True), asked)
    return first, second


def different_rows(makers: Sequence[Callable[[Draw], Row]], count: int, draw: Draw, asked: set[str]) -> list[Row]:
    """`count` rows, the makers taking turns; `asked` holds the questions that were asked before, and is added to."""
    rows: list[Row] = []
    makers = list(makers)
    while len(rows) < count:
        if not makers:
            raise ValueError(f"{len(rows)} different rows of this kind can be made, not {count}; ask for fewer.")
        for maker in makers[:count - len(rows)]:
            row = next((row for row in (maker(draw) for _ in range(PATIENCE)) if question(row) not in asked), None)
            if row is None:
                makers.remove(maker)  # a short table is used up; the others go on
            else:
                asked.add(question(row))
                rows.append(row)
    draw.rng.shuffle(rows)
    return rows


def question(row: Row) -> str:
    """All of a row but its answer."""
    return "\n".join(str(text) for name, text in row.items() if name not in ("output", "label"))


def write(rows: Sequence[Row], file: Path) -> None:
    """UTF-8's own characters rather than escapes, so that you can read what is learned."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if file.suffix == ".json" else "".join(line + "\n" for line in lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("utf-8"))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path, help="where the rows go: .jsonl or .json")
    defaults = ", ".join(f"{kind} {count}" for kind, (count, _) in KINDS.items())
    parser.add_argument("--rows", type=int, help=f"how many; default: {defaults}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows; default: 0")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help="a second file, to measure on")
    parser.add_argument("--heldout-rows", type=int, default=40, help="how many rows it holds; default: 40")
    asked = parser.parse_args(words)
    files = [asked.file] + ([asked.heldout] if asked.heldout else [])
    for file in files:
        if file.suffix not in (".json", ".jsonl"):
            parser.error(f"{file} should end in .jsonl (a row a line) or .json (a list).")
    if len({file.absolute() for file in files}) < len(files):
        parser.error(f"{asked.file} cannot hold both; name another file for --heldout.")
    if min(asked.rows if asked.rows is not None else 1, asked.heldout_rows) < 1:
        parser.error("--rows and --heldout-rows take a number of 1 or more.")
    try:
        made = make_rows(asked.kind, asked.rows, asked.heldout_rows if asked.heldout else 0, asked.seed)
    except ValueError as error:
        parser.error(str(error))
    for rows, file in zip(made, files, strict=False):
        write(rows, file)
        print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
