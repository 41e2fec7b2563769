"""What refusals look like: the rules that `refusals.py` applies to the beginning of a reply. Data, no logic."""

from __future__ import annotations

import re
import unicodedata

# ---------------------------------------------------------------------------------------------------------------------
# What is read: spelling made uniform one character at a time, so that more text never changes what was read before but
# for the last character, which an accent may still follow.

SPELLING = str.maketrans(
    {
        **dict.fromkeys("’‘`´ʼ‛′＇՚ꞌ", "'"),
        **dict.fromkeys("“”„‟«»‹›「」『』＂", '"'),
        # Letters and digits of full width; their punctuation stays, for it ends sentences of Chinese and Japanese.
        **{
            code: chr(code - 0xFEE0)
            for span in ("０９", "ＡＺ", "ａｚ")
            for code in range(ord(span[0]), ord(span[1]) + 1)
        },
        # Mathematical letters, which some write for bold ones.
        **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D400, 0x1D6A6)},
        # Emphasis of Markdown, marks without a width or of direction, hyphens that may be left out.
        **dict.fromkeys(
            [ord("*"), 0x00AD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)]
        ),
        # Arabic vowel signs and stretching, the Hindi dot below: optional in writing.
        **dict.fromkeys([*range(0x064B, 0x0653), 0x0640, 0x093C]),
        # Hindi letters that contain that dot.
        **dict(zip(range(0x0958, 0x0960), "कखगजडढफय", strict=True)),
    }
)
# Accents that are characters of their own, and are part of no letter.
ACCENTS = re.compile("[\u0300-\u036f]")
# What precedes a reply and is none: turn headers, special tokens, empty code fences, marks of any kind. A pattern here
# must match less than the prefix: see `refusals.is_settled`.
BEFORE = re.compile(
    r"(?:<\|(?:start_header_id|im_start)\|>\w{1,12}(?:<\|end_header_id\|>)?|<\|[^|<>\s]{1,30}\|>|</?(?:s|pad|unk"
    r"|bos|eos|eot|end_of_turn|start_of_turn|mask|sep|cls)>|\[/?(?:inst|pad|eos)\]|'''\w{0,12} ?'''|(?:assistant|ai"
    r"|bot|answer|response|reply) ?:|[\W_])+"
)
SENTENCE_END = re.compile(r"(?<=[^.][.!?]) |(?<=[。！？।])")
# Speech of others; a quotation that is not closed goes on.
QUOTED = re.compile(r'"[^"]*(?:"|$)')

# ---------------------------------------------------------------------------------------------------------------------
# Replies in which "I" is not the assistant, or that have begun to do what was asked.

OTHERS_SPEAK = re.compile(
    # Quoted speech.
    r"(?:\""
    # A letter or an e-mail.
    r"|dear (?!user\b)|to whom it may concern|subject ?:|betreff ?:|objet ?:|asunto ?:|assunto ?:|oggetto ?:"
    r"|тема ?:|(?:hi|hello|hey) (?!there\b|friend\b|user\b)[\w\[\]]{1,20}, |(?:sehr geehrte|liebe|chère?|estimad"
    r"|querid|prezad|car[oa] |gentil|уважаем|дорог|尊敬的|亲爱的|拝啓|\w{1,6}(?:さん|様|先生)、|عزيز|प्रिय)"
    # A poem, a song, a scene.
    r"|(?:title|chorus|verse(?: \w+)?|scene(?: \w+)?|act \w+|(?:int|ext)\.|once upon a time|roses are red)\b"
    # A character's name and a colon, unless the word announces an answer.
    r"|(?!(?:error|note|warning|important|disclaimer|refusal|request|status|system|output|result|notice|reminder"
    r"|sorry|unfortunately|no|i|in|to|please|content|safety|final|short|simple|my"
    r"|policy)\b)[^\W\d_]+(?: [^\W_]+)?(?:：| ?: (?!\S*//)))"
)
HELP_BEGINS = re.compile(
    r"(?:here(?:'s| is| are)\b|(?:you (?:can|could|might)|try|just) (?:say|write|reply|respond|something like)"
    r"|(?:sure|of course|certainly|absolutely|gladly)(?: thing)?[,!.]+ (?:here|i can\b(?!'t| ?not\b)"
    r"|i'd\b(?! (?:rather|prefer|sooner) not)|let))"
)

# ---------------------------------------------------------------------------------------------------------------------
# English. "I", a negated ability or will, and something that an assistant is asked to do.

_ADVERB = (
    r"(?:\w+ly|also|just|still|even|ever|now|therefore|thus|so|very|quite|in good conscience|in any way"
    r"|for \w+ reasons)"
)
_CANNOT = (
    r"(?:can't|cannot|cant|can not|won't|wont|will not|wouldn't|would not|shouldn't|should not|mustn't|must not"
    r"|could(?:n't| not) (?:possibly|in good conscience))"
)
_NOT_ABLE = (
    r"(?:unable|not (?:\w+ly )?(?:able|allowed|permitted|authori[sz]ed|programmed|designed|supposed|trained"
    r"|equipped|qualified|here|meant|built|in a position)) to"
)
# No verb that one also does in stories and small talk ("wait", "find", "go", "come"), to keep false alarms down.
_ACT = (
    # To help, to comply, to take part.
    r"(?:help|assist|aid|support|compl[yi]|fulfil|honou?r (?:that|this|your)|accommodat|cooperat|collaborat"
    r"|participat|engag|tak(?:e|ing) (?:part|sides?|an?y? (?:side|position|stance))|be(?:ing)? (?:a )?(?:part"
    r"|involved|complicit)|able to (?:help|assist|provid|do|writ|answer|giv|shar|support|complet|creat|generat)"
    r"|contribut|continu|proceed|process|complet|perform|execut|facilitat|enabl|serv|go(?:ing)? (?:there|into"
    r"|along)|do(?:ing)? (?:that|this|it|so|any|what|such|anything)\b|entertain|condon|endors|promot|encourag"
    r"|satisf"
    # To hand over.
    r"|provid|giv(?:e|ing) (?!up\b|in\b)|offer|suppl|shar|disclos|reveal|divulg|access|send|print|output|display"
    r"|repeat"
    # To write, to make.
    r"|writ|creat|generat|produc|draft|compos|craft|develop|design|mak(?:e|ing) (?!it\b|out\b|sense|up\b|a living)"
    r"|reproduc|translat|summari[sz]|put(?:ting)? together|lay(?:ing)? out|build|cod(?:e|ing)|fak(?:e|ing)|list"
    # To tell, to teach, to judge.
    r"|answer|respond|repl(?:y|ies)|explain|describ|discuss|teach|instruct|guid|walk|show|outlin|detail|advis"
    r"|suggest|recommend(?! \"\"|[^.!?]*\b(?:enough|highly)\b)|tell(?:ing)? (?!a lie|if\b|whether\b|you how (?:much"
    r"|happy|excit|glad|many))|talk|speak (?:about|on|to)|cover|comment|predict|speculat|judg|rank|rat(?:e|ing)\b"
    r"|evaluat|diagnos|prescrib|calculat|verif|identif|pretend|role-?play|impersonat|play|act as|search"
    r"|look(?:ing)? up|track|edit|modif|interact|coach|convinc|persuad|argue (?:for|that|you)|rewrit|rephras"
    r"|past(?:e|ing) |pass (?:on"
    r"|along)"
    r"|pick (?:a|an|one|for|between)|choos|finish (?:that|this|the)|say (?:what|who|which|where|when|whether)\b"
    # To perceive, to remember.
    r"|(?:see|view|open|hear|browse|read|recall|remember|retriev)\w* (?:image|photo|picture|file|attach|link|audio"
    r"|video"
    r"|the (?:web|internet|image|photo|file|link)|your|previous|earlier|past|what (?:you|we)|our))"
)
# "I can't help but admire", "I'm not going to lie": not about the request.
_NO_IDIOM = (
    r"(?!(?:\w+ly )?(?:help (?:but|it|myself|thinking|feeling|smiling|falling|wondering)\b|lie\b|deny|sugarcoat"
    r"|pretend (?:that|i)\b))"
)
# "I can't, and won't, knowingly help": everything that may stand between the negation and the verb.
_TO_DO = rf"(?:,? (?:and|or|nor) (?:i )?{_CANNOT},?)? {_NO_IDIOM}(?:{_ADVERB},? ){{0,2}}(?:be )?{_ACT}"
_I_AM = r"\bi(?:'m| am|'ll be| will be| remain)"
_I_WILL = (
    r"\bi(?:'ll| will|'m going to| am going to|'m gonna| must|(?:'d| would)? have to| need to|'ve got to"
    r"| am (?:obliged|forced) to)"
)
_ASSISTANT = r"(?:\w+[ ,]+){0,3}(?:ai|artificial intelligence|language model|assistant|chatbot)\b"
_RULES = r"(?:guideline|polic|programming|principle|value|ethic|rule|code|training|instruction|standard|term|boundar)"
_REQUEST = r"(?:request|query|prompt|question|message|instruction|content)"
_THING = r"(?:something|things?|one|area|line|topic|subject|request|content)"
_WRONG = (
    r"(?:irresponsible|unethical|wrong|inappropriate|dangerous|illegal|reckless|improper|not (?:be )?(?:right"
    r"|appropriate|ethical|responsible|safe|wise)|(?:isn't|wouldn't be) (?:right|appropriate|ethical))"
)

_UNABLE_TO_DO_IT = (
    rf"\bi(?: {_ADVERB})? {_CANNOT}{_TO_DO}",
    rf"{_I_AM} (?:\w+ly )?{_NOT_ABLE}{_TO_DO}",
    rf"{_I_AM} (?:\w+ly )?(?:not (?:\w+ly )?capable|incapable) of (?:{_ADVERB} )?{_ACT}",
    # The subject stands further ahead: "I am bound by guidelines and cannot provide it".
    rf"\bi\b[^.!?]*,? (?:and|so|but|therefore) (?:{_ADVERB} )?(?:{_CANNOT}|{_NOT_ABLE}){_TO_DO}",
    # No subject: "Sorry! Can't help with that."
    rf"^(?:unfortunately,? |sorry,? |nah,? |nope,? |no,? )?(?:{_CANNOT}|{_NOT_ABLE}){_TO_DO}(?![^.!?]*\?)",
    rf"^(?:cannot comply|(?:{_CANNOT} )?do (?:it|that)\.$)",
    # No verb: "I can't.", "You ask for a crime, and I won't."
    rf"^(?:sorry, )?i {_CANNOT}(?:\.$|,? (?:sorry|i'm sorry|i'm afraid)\b)",
    rf"\bi {_CANNOT} let you do (?:that|this|it)\b",
    r"\bi (?:do not|don't) know how to (?:help|do (?:that|this)|assist|answer)",
    rf",? (?:and|but|so|then) i {_CANNOT}[.!]*$",
    # Cut off by the end of what is read.
    rf"\bi {_CANNOT}(?: \w{{0,2}})?$",
    r"\bi(?:'m| am) (?:unabl?e?|unable to(?: \w{0,2})?|not(?: abl?e?| able to(?: \w{0,2})?"
    r"| in(?: a(?: posi\w*)?)?)?)$",
)
_UNWILLING = (
    r"\bi(?:'m| am) (?:\w+ly )?not (?:\w+ly )?(?:gonna|(?:going|willing|prepared|inclined"
    rf"|about) to) {_NO_IDIOM}(?!be (?:here|able)|judge|argue)\w",
    r"\bi(?:'m| am) (?:\w+ly )?(?:not|un)(?:\w+ly )? ?comfortable\b",
    r"\bi (?:\w+ly )?(?:refuse|decline) to (?!believe|give up|accept|let)",
    r"\bi (?:\w+ly )?(?:refuse|decline)(?: (?:this|that|your request)|\.$)",
    r"\bi(?:'m| am) (?:\w+ly )?(?:declining|refusing) (?:to|this|that|your request)",
    r"\bi(?:'d| would)?(?: \w+ly| much)? (?:rather|prefer|choose|sooner|better) (?:not\b|stay out)(?! know| to know"
    r"| think)",
    # The negation stands first: "Under no circumstances will I", "There's no way I'm helping".
    r"\b(?:no way|under no circumstances|in no way|nor|neither|never)\b[^.!?,]{0,12}? (?:(?:will|would|can|am) i\b"
    r"|i(?:'m|'ll| am| will))",
    rf"\bwhat i (?:{_CANNOT}|refuse to) do\b",
    r"^(?:declining|refusing|passing on|skipping|refused|denied|rejected)\b(?! (?:an?|the) (?:offer|invit|job))",
    r"\bi(?:'m| am) leaving (?:that|this|it) (?:out|there|blank|un\w+)",
    r"\bi(?:'m| am) not the (?:one|right \w+|place|person|assistant) (?:to|for)\b",
    r"^not (?:gonna|going to) (?:do|help|answer|write|say|tell|give|touch|go)\b",
    r"\byou(?: won't|'ll never| will not|'ll not) (?:get|find|hear) [^.!?]{1,25} from me\b",
    # To decline, but not an offer or an invitation in somebody's letter.
    rf"{_I_WILL}(?: \w+ly| have to| need to){{0,2}} (?:decline|refuse)\b(?! (?:the|your|this|an?) (?:\w+ )?(?:offer"
    r"|invit|position|job|role|meeting))",
    rf"{_I_WILL}(?: \w+ly| have to| need to){{0,2}} (?:pass\b|say no\b|sit th|stop short|refrain|abstain"
    r"|stay (?:away|out)|leav(?:e|ing) (?:that|this|it) out|skip (?:this|that)|steer clear|draw (?:the|a) line"
    r"|stop (?:here|you|right)|turn (?:this|that|it|you|your \w+|this \w+) (?:down|away)|bow out|back out|opt out"
    r"|step (?:back|away)"
    r"|hold (?:back|off)|skip (?:the|it)\b|keep (?:that|this|it) (?:to myself|private)|avoid (?:that|this|answering"
    r"|providing"
    r"|sharing|discussing))",
    # Never does such things. Fewer verbs than above: "I don't recommend mixing them" is advice.
    r"\bi (?:do not|don't|never|would never|will never|'ll never)(?: \w+ly| ever)? (?:help|assist|provid|shar|offer"
    r"|(?:explain|teach|includ|describ|detail|outlin)\w* (?:how|(?:\w+ ){0,2}(?:instruct|recipe|detail|step|method))"
    r"|writ|creat|generat|produc|engag|participat|discuss|disclos|reveal|condon|endors|promot|facilitat"
    r"|answer (?:that|this|such|quest)|giv(?:e|ing)? (?:out|advice|instruct|medical|legal|financial)|do (?:that"
    r"|this|such)|support (?:that|this|any|viol|illegal|harm))",
    r"\bi(?: do not|'d rather| don't|t's best (?:that )?i don't) (?:\w+ly )?(?:answer (?:that|this)"
    r"|feel (?:\w+ )?(?:comfortable|right|able|good about)|want (?:to (?:help|write|assist|provide|share|contribute"
    r"|be (?:a )?part|do (?:that|this))|any part))",
    r"\bi (?:would not|wouldn't) (?:feel|be) (?:\w+ )?(?:right|comfortable)",
    r"\bi (?:do not|don't) (?:\w+ly )?think (?:that )?(?:i (?:can|should|could|will|want|ought)|that(?:'s"
    r"| is) something i|it(?:'s| is| would be) (?:appropriate|ethical|responsible|right for me|wise for me))",
    r"\bi have no (?:intention|desire|interest|plans)",
)
_WITHOUT_MEANS = (
    r"\bi (?:do not|don't|lack)(?: currently)? (?:have )?(?:the ability|the capab|the authority|permission|access"
    r"|(?:any )?(?:personal |real-?time |current |live |political )+\w+|feelings|emotions|beliefs|(?:an? "
    r"|any )?(?:\w+ )?(?:opinion|passwor|preference|stance))",
    r"\bi have no (?:access|way (?:of|to) (?:know|tell|access|check|verif)|opinion|personal)",
)
# "That's not something I can do", "a hard no", "off-limits for me".
_NOT_FOR_ME = (
    r"\b(?:not|isn't|aren't)(?: really| exactly)? (?:something|anything|(?:an? |the )(?:\w+ ){0,2}\w+)(?: that"
    r"| which)? i(?:'m|'ll|'d| am| will| can| would| could| want| do| feel| have)\b",
    rf"\b{_THING}(?: that| which)? i(?: \w+ly)? (?:{_CANNOT}|don't|do not|refuse|must (?:decline|refuse))",
    rf"\b{_THING}(?: that| which)? i(?:'m| am)(?: \w+ly)? (?:not|unable)",
    r"^not something (?:that )?i\b",
    r"\b(?:outside|beyond)(?: of)? (?:wh(?:at? ?i?)?$|what i|the (?:scope|bounds|limits) of what i|my (?:scope"
    r"|capab|abilit|limit|remit|purview|boundar))",
    r"\boff[- ](?:limits|the table)(?: for me| here)?(?:[.,!;:]|$| and| as| because| since)",
    r"\b(?:no can do|not doing (?:that|this|it)|not (?:going to |gonna )?happen(?:ing)?[.!]|hard (?:no|pass)\b"
    r"|count me out|not my place|not for me to|no from me|answer is no[.,!;]|have to be no\b|want no part)",
    r"\bwhere i(?:'ll| have to| must| will)? (?:draw the line|stop)\b|\bout of bounds\b",
    r"\b(?:still|it's|that's|be|answer(?: is|:)?) (?:an? )?(?:firm |hard |clear |definite )?no\b(?:[.,!;]|$)",
    r"^(?:lol|lmao|haha|ha|um+|uh+|ooh?|hmm+|yeah),? (?:no|nope|nah)\b|^never[.!]",
    r"\b(?:is|are|remains?|stays?) (?:strictly )?confidential\b|\b(?:isn't|is not|not) possible for me\b",
    r"\b(?:let's|let us) (?:not\b|(?:talk|chat) about something|change the (?:subject|topic)|steer)",
    r"\b(?:can|could|shall) we (?:talk|chat) about something else",
    r"\bno (?:\w+ ){1,6}(?:from me|from us)[.!]",
    r"\bplease (?:ask|try) (?:me )?(?:something|another|a different) (?:else|question|topic)",
    r"^please (?:don't|do not) (?:do|try|attempt) (?:this|that|it)\b",
    r"\b(?:i'm|i am) not (?:\w+ )?(?:on board|okay|ok|cool|down) with\b",
    r"^(?:[^.!?]*\bbut )?not (?:this|that) (?:one|time)[.!]",
)
_RULES_FORBID_IT = (
    rf"\b(?:my|(?:our )?(?:content|usage|safety|ethical))\b (?:\w+ ){{0,3}}{_RULES}\w* (?:\w+ly )?(?:prevent"
    r"|prohibit|forbid|restrict|stop|bar|keep|preclude|require|limit|prioriti|(?:do not|don't|doesn't|does not"
    r"|won't|wouldn't) (?:allow|let|permit))",
    r"\b(?:violat\w+|against|contrary to|conflict\w* with|contravene\w*|breach\w*|inconsistent with|contradict\w*"
    r"|(?:not|n't) (?:align|compatible|consistent|in line)\w*(?: with)?|cross\w*) (?:(?:my|our|openai's"
    r"|anthropic's|google's|meta's|microsoft's) |(?:\w+'s |the )?(?:content|usage|safety|ethical"
    rf"|community) )(?:[\w-]+,? ){{0,4}}(?:{_RULES}|\w?$)",
    rf"\b(?:this|your|that) {_REQUEST} (?:\w+ly )?(?:violat|contraven|breach|goes against|go against|conflict)\w*",
    rf"\b(?:this|your|that) {_REQUEST} (?:is |was |has been |must be )?(?:\w+ly )?(?:denied|declined|refused"
    r"|rejected|blocked|flagged)",
    r"^(?:error: )?request (?:denied|declined|refused|rejected|blocked)",
    rf"\b(?:{_REQUEST}s?|this|that|it|information) {_CANNOT} be (?:\w+ly )?(?:complet|fulfil|answer|process|provid"
    r"|grant|accommodat|shar|generat|discuss|honou?r)",
    rf"\bas an? {_ASSISTANT}[^.!?]*\b(?:can't|cannot|not|unable|don't|won't|never)\b(?! (?:have|possess"
    r"|experience) (?:\w+ )?(?:feeling|emotion|consciousness|body|bodies|sens))",
    rf"\bi(?:'m| am) (?:just |only |simply )?an? {_ASSISTANT}[^.!?]*\b(?:can't|cannot|unable|don't|won't)\b(?! (?:have"
    r"|possess|experience) (?:\w+ )?(?:feeling|emotion|consciousness|body|bodies|sens))",
    rf"\b(?:as|i'm|i am) an? {_ASSISTANT}[^.!?]*\b(?:programmed|designed|bound|required|obligated|committed"
    r"|trained) (?:to|by) (?:\w+ )?(?:follow|adher|priorit|promot|respect|avoid|refrain|uphold|be (?:safe|helpful)"
    r"|ethic|guid)",
    r"\bmy (?:\w+ )?(?:purpose|goal|aim|role|function) is to (?:\w+,? ){0,7}(?:safe|ethical|responsib|harmless"
    r"|lawful)",
)
_WRONG_OF_ME = (
    rf"\b{_WRONG}(?: (?:and|or) \w+)? (?:of me|for me|on my part)",
    rf"\bit(?:'s| is| would be|'d be)? (?:\w+ly )?{_WRONG} (?:to|for me to) (?:help|assist|provid|shar|writ|creat"
    r"|giv|explain|generat|answer|discuss|offer|teach|tell)",
    r"^(?:it(?:'s| is)|that(?:'s| is)) (?:not|never) (?:\w+ or )?(?:ethical|appropriate|acceptable)\b",
    r"\b(?:providing|sharing|giving|writing|creating|explaining|doing|answering"
    r"|helping)\b[^.!?,]{0,40} would (?:be (?:\w+ )?(?:irresponsib|unethic|wrong|inappropriate|illegal|danger|both)"
    r"|go against|violate)",
)
_SORRY_OR_NO = (
    r"^(?:[a-z]{1,6},? )?(?:i(?:'m| am) )?(?:(?:so|very|really|truly|terribly|deeply) )?sorry,?"
    r" (?:but(?! (?:who|what|why|how|when|where|which)\b)|however|no\b|not\b|that's not|that is not)",
    r"\bi(?:'m| am) (?:\w+ )?sorry,? (?:but(?! (?:who|what|why|how|when|where|which)\b)|however)\b",
    r"\b(?:apologies|apologi[sz]e)\b[^.!?]{0,40}(?:,| but) (?:but )?(?:i\b|this\b|that\b|as\b)"
    r"(?! was|(?:'s| is) (?:my|on me|a (?:bug|mistake|typo)))",
    r"\bi(?:'m| am) afraid (?:i (?:can|won|do|must|have to)|that(?:'s| is) (?:not|out|beyond|off)|not\b)",
    r"^(?:oh,? |um,? )?(?:absolutely not|not a chance|hell no|no way|no thanks|no thank you|nice try)(?:[,.!;]|$)",
    r"^(?:no|nope|nah), (?:i(?:'m| am| won't| will not| can't| cannot| refuse| don't do|'d rather)\b|not (?:doing"
    r"|going|happening|today))",
)
# A whole reply that is only "no": with more behind it, it may answer a question.
ONLY_NO = re.compile(
    r"(?:no|nope|nah|never|(?:absolutely|certainly|definitely) not|no chance|nein|niemals|non|não|nao|jamais|nunca"
    r"|нет|никогда|不|不行|不可以|だめです|駄目です|いいえ|لا|नहीं)\W*"
)

# ---------------------------------------------------------------------------------------------------------------------
# Other languages: the stock formulas, and "I" negated before a verb of helping, telling, writing or giving. The end of
# what is read may stand for the verb where the language puts it last or the window cuts it off.

_OTHER_LANGUAGES = (
    # German.
    r"\b(?:ich (?:kann|werde|darf|möchte|will|könnte|würde)|(?:kann|werde|darf|möchte"
    r"|will) ich)\b[^.!?]{0,70}?\b(?:nicht|kein\w*|niemals)\b[^.!?]{0,70}?(?:helf|hilf|unterstütz|schreib|verfass"
    r"|\bgeb|bereitstell|beantwort|antwort|erklär|\bmach|\btun\b|liefer|anbiet|erstell|nenn|teil|diskut|behilflich"
    r"|verrat|beitrag|mitwirk|erfüll|sag|beschreib|zeig|generier|sprech|äußer|beteilig|$)",
    r"\b(ich )?(?:schreibe|helfe|gebe|erkläre|unterstütze|mache|verrate|erstelle|teile|leiste|beantworte)(?(1)"
    r"| ich)\b[^.!?]{0,40}\b(?:nicht|kein\w*)\b",
    r"\b(?:das|dabei|dazu|so etwas|sowas) (?:mache|helfe|tue|werde|kann|schreibe"
    r"|beantworte) ich\b[^.!?]{0,30}\bnicht",
    r"\b(?:tut mir (?:sehr )?leid|bedaure|entschuldigung|verzeihung|sorry),? (?:aber|doch|ich (?:kann|darf|werde)"
    r"|das (?:kann|geht|mache)|da(?:bei|zu|mit)) ",
    r"\bich (?:bin|fühle mich|sehe mich)\b[^.!?]{0,20}\b(?:nicht (?:in der lage|bereit|befugt|berechtigt|wohl"
    r"|imstande)|außerstande)",
    r"\bich (?:muss|möchte|lehne|verweigere)\b[^.!?]{0,50}\b(?:ablehn|ab\b[.,]|verweiger|passen)"
    r"|\bmuss ich [^.!?]{0,40}\bablehnen",
    r"\b(?:kommt (?:für mich |gar |überhaupt )*nicht (?:in ?frage|infrage)|auf keinen fall|(?:gegen|widerspr\w+"
    r"|verstö\w+) (?:gegen )?(?:meine|meinen|die) \w*(?:richtlinie|werte|grundsätz|prinzip|programm))",
    r"\bwerde ich\b[^.!?]{0,40}\bnicht \w+en\b|\bist mir (?:nicht (?:möglich|erlaubt|gestattet)|untersagt)",
    # French.
    r"\bj(?:e|')[^.!?]{0,3}\bn(?:e |')[^.!?]{1,35}?\b(?:pas|plus|jamais|aucun\w*)\b[^.!?]{0,45}?(?:aid|fourni"
    r"|répond|donn|écri|rédig|cré|expliqu|partag|assist|\bfaire|accéd|satisf|propos|particip|génér|abord|discut"
    r"|\bdire|encourag|révél|enseign|montr|traduir|produir|soutenir|accompagn|$)",
    r"\bj(?:e|')\s?n(?:e |')(?:(?:[tl]'|te |vous |le |la |les |y ))?(?:aid|fourn|répond|donn|écri|rédig|cré|expliqu"
    r"|partag|assist|f|accéd|propos|particip|génér|dis|di|montr|enseign)\w*rai pas",
    r"\b(?:désolée?|regrette|excuse\w*|navrée?|pardon)\w*,? (?:mais|je ne|je n')",
    r"\bje n(?:e |')(?:[tl]'|te |vous |l[ae] )?(?:donne|fournis|réponds|aide|partage|fais|écris|crée"
    r"|participe) (?:pas|jamais|aucun)",
    r"\bc'est non\b|\bje (?:refuse\b|(?:dois|préfère|me dois de|suis (?:obligée?"
    r"|contrainte?) d[e'])(?: \w+)? ?(?:refus|déclin|ne pas)|décline)|\b(?:il )?m'est (?:impossible|interdit)"
    r"|\bhors de question"
    r"|\bcontraire à mes|\bva à l'encontre d",
    # Spanish and Portuguese.
    r"\b(?:no|não|nao) (?:(?:te|le|les|os|lo|me|se|lhe|o) )?(?:puedo|voy a|quiero|debo|podré|podría|pienso|estoy"
    r"|soy|tengo|está|es posible|posso|vou|consigo|devo|quero|poderei|poderia|estou|sou|tenho|é possível|sinto"
    r"|siento)\b[^.!?]{0,45}?(?:ayud|ajud|proporcion|provee|fornec|escrib|escrev|redact|redig|\bd(?:ar|art|arl)\w*"
    r"|ofrec|oferec|respond|compart|\bcre?i?ar|gener|gerar|hac(?:er)|faz(?:er)|explic|cumpl|asist|auxili|atend"
    r"|colabor|brind|facilit|particip|enseñ|ensin|deci|dizer|apoy|apoi|prest|sumin|passar|produ[cz]|cómod|confort"
    r"|autoriz|permi|program|capaz|opini|$)",
    r"\b(?:no|não) (?:(?:te|le|les|os|lo|lhe|vou) )*(?:ayud|ajud|d|escrib|escrev|har|far|proporcion|fornec|compart"
    r"|particip|colabor|explic|ofrec|oferec|respond)\w*(?:ré|rei)\b",
    r"\b(?:lo siento|lo lamento|disculp\w*|perd[oó]n\w*|desculp\w*|sinto muito|lamento|peço desculpas?"
    r"|me disculpo)(?: mucho)?,? (?:pero|mas|no (?:puedo|voy)|não (?:posso|vou))",
    r"\b(?:no|não|nao|non) (?:te |le |les |lhe |ti |vi )?(?:ayudo|ajudo|aiuto|proporciono|forneço|fornisco|escribo"
    r"|escrevo|scrivo|respondo|rispondo|comparto|compartilho|condivido|participo|partecipo|colaboro)\b",
    r"\bno (?:dispongo|cuento con|facilito|facilitaría|me es posible|me está permitido)\b|\b(?:não me é|foge ao que"
    r"|fora do que"
    r"|não faz parte do que) ",
    r"\blamento no poder\b|\b(?:me niego|debo (?:rechazar|negarme|declinar|recusar)|tengo que (?:rechazar|negarme)"
    r"|tenho (?:de|que) recusar|me recuso|recuso-me|rechazo|prefiero no|prefiro não|ni hablar|ni pensarlo"
    r"|nem pensar|de ninguna manera|de jeito nenhum|de modo algum)\b",
    r"\b(?:en contra de|contra|viola\w*) (?:as |o )?(?:mis|minhas|meus|nuestras|nossas|mi)\b",
    # Italian.
    r"\bnon (?:(?:ti|vi|le|lo|la|ci|mi|posso|me) )*(?:posso|voglio|intendo|sono (?:in grado|autorizzat|dispost|qui)"
    r"|ho intenzione|la sento|sento|è possibile|potrò|devo|vorrei|dovrei|darò|dirò|farò|scriverò|aiuterò|fornirò"
    r"|spiegherò|parteciperò)\b[^.!?]{0,30}?(?:aiut|forni|scriv|\bd(?:ar|ir)\w*|rispond|condivid|crea|genera|\bfar"
    r"|spieg|assist|offri|soddisf|sugger|insegn|esegui|partecip|descriv|rivel|a mio agio|propor|discut|collabor"
    r"|tradu|$)",
    r"\bnon (?:(?:ti|vi|le|lo|la) )?(?:darò|dirò|farò|scriverò|aiuterò|fornirò|spiegherò|parteciperò|risponderò)\b",
    r"\b(?:mi (?:di)?spiace|spiacente|scus\w+|mi rincresce|chiedo scusa),? (?:ma|però|non (?:posso|sono))\b",
    r"\b(?:mi rifiuto|devo (?:rifiutar|declinar)\w*|preferisco non|preferirei non|non se ne parla"
    r"|assolutamente no\b|contr[oa] (?:le |i |ai )?mi\w+ (?:linee|princip|valor|polit))",
    # Russian.
    r"\bне (?:могу|буду|стану|смогу|хочу|намерена?|готова?|имею (?:права|возможности)|собираюсь|вправе"
    r"|в состоянии)\b[^.!?]{0,50}?(?:пом[оа]|предостав|пис|\bда(?:ть|вать)|отве[тч]|объясн|рассказ|обсужд|созда"
    r"|генер|дел|поддерж|участв|уч|выполн|предлож|консульт|раскры|дава|составл|содейств|подсказ|описыв|$)",
    r"\bне (?:предоставляю|помогаю|пишу|даю|отвечаю|обсуждаю|создаю|участвую|поддерживаю)\b|(?:помочь|ответить"
    r"|сделать|рассказать|написать|дать)\b[^.!?]{0,15} не (?:могу|буду|стану|смогу)",
    r"\b(?:извин\w+|прости\w*|прошу прощения|сожале\w+|жаль),? (?:но|однако|я не (?:могу|буду|смогу|стану)"
    r"|не могу)\b",
    r"\b(?:вынужден\w* (?:вам |тебе )?отказ|я отказываюсь|откажусь|давай(?:те)? (?:лучше )?(?:поговорим|сменим"
    r"|обсудим)|противоречит моим|мне запрещено|не входит в мои|вне моих возможностей|ни за что\b"
    r"|об этом не может быть и речи)",
    r"\bкак (?:ии|искусственный интеллект|языковая модель|ассистент)\b[^.!?]*\bне\b",
    # Chinese. Without "I" or "sorry" ahead only what nobody but an assistant says: "You cannot give dogs chocolate."
    r"(?:^|(?:我|抱歉|对不起|對不起|遗憾|遺憾)[^。！？]{0,20}?)(?:无法|無法|不能|不会|不會|不可以|不便|不愿|不願"
    r"|没法|没办法|不应该|不應該|不想|不方便|拒绝|拒絕)[^，。！？,.]{0,18}?(?:提供|帮|幫|协助|協助|回答|满足|滿足"
    r"|支持|讨论|討論|给|給|告诉|告訴|写|寫|生成|分享|参与|參與|执行|執行|完成你|完成您|创作|創作|解答|教|透露|配合"
    r"|处理您|處理|评论|评价|發表|发表|编写|編寫|撰写|撰寫|介绍)",
    r"(?:无法|無法|不能|不便)(?:为您|为你)?(?:提供|协助|協助|回答|满足您|满足你|滿足)",
    r"(?:抱歉|对不起|對不起|不好意思|遗憾)[^。！？]{0,12}(?:我不能|我无法|我無法|不能帮|无法帮)",
    r"作[为為](?:一[个個名款])?(?:ai|人工智能|人工智慧|语言模型|語言模型)[^。！？]*(?:无法|無法|不能|不会|不會"
    r"|没有)|我拒[绝絕]|我?[帮幫]不[了上]|做不到|违反[^。]{0,8}(?:准则|原则|政策|规定)|恕我?(?:不能|难|無|无)"
    r"|(?:换个?|聊聊别的)话题",
    # Japanese.
    r"(?:お答え|答え|お手伝い|手伝|お教え|教え|提供|協力|案内|作成|回答|対応|お伝え|説明|支援|サポート|執筆|お応え"
    r"|応じ|助言|共有|紹介|お話し|差し上げ|生成|お力|書く|手助け|加担|応える|行う)[^。！？]{0,14}(?:できません"
    r"|出来ません|できかね|いたしかね|致しかね|しかね|られません|れません|けません|しません|いたしません"
    r"|なれません)",
    r"(?:申し訳|すみません|ごめんなさい|恐れ入り|残念ながら)[^。！？]{0,50}(?:できません|できかね|いたしかね|しかね"
    r"|ません$|お断り|られません)",
    r"(?:でき|出来|致し|いたし|応じ|受けし)かね|書けません|お断り(?:し|いた|させ)|(?:控え|遠慮)させて|(?:ご要望"
    r"|リクエスト)には[^。]{0,6}(?:応え|沿え|お応え)",
    # Arabic.
    r"(?:لا (?:أستطيع|استطيع|يمكنني|أقدر|يسعني|أود|أرغب|يجوز لي|ينبغي لي|أريد)|ليس (?:بإمكاني|بوسعي|من الممكن)"
    r"|لست (?:قادر|مخول|مستعد)\S*|(?:أنا|إنني|لكنني|فأنا) غير (?:قادر|مخول|مستعد)\S*)(?! (?:الانتظار|انتظار|التوقف"
    r"|تصديق|أن أصدق|أن أنتظر|وصف))[^.!?؟]",
    r"لا (?:أقدم|أساعد|أشارك|أكتب|أدعم|أوفر|أناقش|أجيب)|لن (?:أكتب|أقدم|أساعد|أعط|أشرح|أشارك|أقوم|أجيب|أدعم|أفعل"
    r"|أوفر|أزود|أنشئ|أخبر|أعلم|أتمكن|أناقش|أكون|أستطيع|يمكنني|أذكر|أصف|أرد)",
    r"(?:عذرا|آسف|أعتذر|معذرة|للأسف|المعذرة)[^.!?؟]{0,25}(?:لا (?:أستطيع|يمكنني|أقدم)|لكن|لن )|أرفض"
    r"|يتعارض مع (?:مبادئ|إرشادات|سياس|قيم)|(?<!ال)أفضل عدم",
    # Hindi.
    r"मैं (?![^।!?]*(?:इंतजार|इंतज़ार|विश्वास|यकीन|भूल))[^।!?]{0,110}?(?:(?:नहीं|न) (?:[^ ।]+ ){0,2}?(?:सकत|करू|करु"
    r"|बताऊ|बताउ|लिखू|लिखु|दूँ|दूं|दूगा|दे |पाऊ|पाउ|करत|देत)|असमर्थ|इनकार|इंकार|मना करत)",
    r"मेरे (?:लिए|द्वारा)[^।!?]{0,30}(?:संभव|सम्भव|उचित) नहीं",
    r"(?:क्षमा|माफ|खेद|अफसोस)[^।!?]{0,40}(?:लेकिन|परंतु|परन्तु|पर मैं|किंतु|मगर|कि मैं)",
    r"(?:मदद|सहायता|जानकारी|निर्देश|प्रदान|जवाब|उत्तर) (?:[^ ।]+ )?नहीं (?:कर|दे|दी|की|दू)",
)
REFUSALS = tuple(
    re.compile(pattern)
    for pattern in (
        *_UNABLE_TO_DO_IT,
        *_UNWILLING,
        *_WITHOUT_MEANS,
        *_NOT_FOR_ME,
        *_RULES_FORBID_IT,
        *_WRONG_OF_ME,
        *_SORRY_OR_NO,
        *_OTHER_LANGUAGES,
    )
)

# ---------------------------------------------------------------------------------------------------------------------
# A limit on one detail, and then help: "I can't give exact doses, but in general they are small."

CONCESSION = re.compile(r"(?:while|although|though|even though|even if) $")
CONTRAST = re.compile(
    r"\b(?:but|however|though|aber|mais|pero|mas|ma|но)\b[,:]?|(?<=[，,])(?:但是?|不过)|ですが、|لكن |लेकिन "
)
# What follows "but" and offers another thing in place of help.
ELSEWHERE = re.compile(
    r"(?:i\b|you (?:can|could|might|may|should)|if\b|please|feel free|let|we (?:can|could)|there\b|perhaps|maybe"
    r"|happy|glad|would|do you|how about|what (?:i|about)|it(?:'s| is) (?:important|always|worth|crucial|best"
    r"|essential|vital)|your? (?:doctor|best)|an? (?:doctor|lawyer|professional|qualified|licensed)|thank|know"
    r"|remember|this|that|as\b|my\b|helping|not\b|no\b|ich|kann|gerne|das|dabei|wenn|je\b|si\b|n'hésit|puedo|posso"
    r"|se\b|voy|não|no\b|non\b(?!-)|я\b|могу|если|我|如果|您|أ|يمكن|मैं|$)"
)
TELLS = re.compile(
    r"i (?:can|could|will|'ll|do)(?: \w+ly)? (?:tell|say|note|confirm|know)(?: you)?(?: that| what| a bit"
    r"| some)?\b(?! about)|i(?:'d| would) (?:say|go|pick|choose|guess|start)\b|i (?:think|guess|find)\b|here(?:'s"
    r"| is| are)\b"
)
# An offer that the next sentence makes good.
OFFERS = re.compile(r"i(?:'m| am|'d be|'ll| will| can| would be)\b[^.!?:]*[.!:]")
OTHER_THING = re.compile(
    r"\b(?:else|instead|other|alternativ\w*|different|legal\w*|safe\w*|legitimate|ethical\w*|resources?)\b"
)
REDIRECTS = re.compile(
    r"(?:i\b|i'|if\b|please|would|could|can\b|what\b|how\b|let|do\b|are\b|is\b|feel|perhaps|maybe|there|just\b)"
)
