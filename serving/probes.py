"""Texts and conversations that bring out an export's faults: digits, contractions, scripts, emoji, spaces, code."""

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "In 1969, 2 of the 3 astronauts walked 3,300 feet; 47.5 lb came back. Call +1 (555) 010-9999 at 08:45.",
    "1234567890 3.14159265358979 0x1F4A9 1e-05 10,000,000 v2.13.0 192.168.0.1 2026-11-22T20:25:00Z 007",
    "I'm sure they'll say it's what we've done; she'd've known, y'all, rock 'n' roll, O'Brien'S DON'T WE'RE",
    "日本語の文章です。今日は天気がいいですね。東京タワー 333メートル、1958年。",
    "中文测试：人工智能在2024年发展迅速，价格是￥99.80。",
    "한국어 문장도 있습니다. 서울의 인구는 약 9백만 명입니다.",
    "Привет, мир! Ёлка стоит 100₽. Ελληνικά: καλημέρα. עברית שלום. العربية مرحبا ١٢٣",
    "Emoji: 😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ — “quotes” … ½ ² ™ naïve café Ångström ǅ",
    "spaces:  two   three    four\ttab\t\ttabs\n\nblank\n \n  indented\r\nwindows   \n",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # comment\n\n\tif a<=b and c!=d:\n\t\tpass\n",
    "SELECT id, name FROM users WHERE age>=21 AND email LIKE '%@example.com'; -- 12\n{\"a\": [1, 2.5, null, true]}",
    "https://example.org/a/b?x=1&y=%20#top  C:\\Users\\me\\file.txt  ~/.config  foo_bar-baz.qux::Quux<int>[3]",
    "!!!???...---___***###@@@$$$%%%^^^&&&((()))[[[]]]{{{}}}|||\\\\\\///<<<>>>===+++```~~~",
    "aAaA McDonald iPhone HTTPServer XMLHttpRequest camelCaseWords SCREAMING_SNAKE ÉCOLE ﬁne ſtrange",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had three daughters. Every morning he "
    "rowed out before the sun had risen, and every evening he came back with his nets full of silver fish. The eldest "
    "daughter mended the nets, the second sold the fish at the market, and the youngest, who was curious about all "
    'things, asked him what lay beyond the horizon. "Water," he said, "and after the water, more water, and after '
    'that, they say, a country where nobody has ever been hungry." She thought about this for a long time, and on the '
    "day that she was seventeen she took the smallest boat, a loaf of bread, a jug of water and her father's old "
    "compass, and set out to see whether what they said was true.",
)
CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "12+7 = ?"}),
    (
        {"role": "user", "content": "Hello  there, it's 2026!"},
        {"role": "assistant", "content": "Hi. How can I help?"},
        {"role": "user", "content": "翻译：good morning 😀\n\n1. one\n2. two"},
    ),
    (
        {"role": "system", "content": "Du bist höflich."},
        {"role": "user", "content": "def f(x):\n    return x"},
        {"role": "assistant", "content": "It returns its argument."},
        {"role": "user", "content": "Why?"},
    ),
)
