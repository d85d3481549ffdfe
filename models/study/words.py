"""Words and question patterns for ``questions``. Data only; written for this project.

A pattern's places are names of ``WORDS`` or of the numbers that ``questions`` draws (small, number, other, large).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(";") if part.strip())


WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "animal": _list(
            "cat; dog; horse; cow; pig; sheep; goat; chicken; duck; rabbit; mouse; squirrel; fox; wolf; bear; lion; "
            "tiger; leopard; cheetah; elephant; giraffe; zebra; hippopotamus; rhinoceros; monkey; gorilla; chimpanzee; "
            "kangaroo; koala; panda; penguin; owl; eagle; parrot; crow; sparrow; swan; peacock; flamingo; snake; frog; "
            "lizard; turtle; crocodile; shark; whale; dolphin; octopus; salmon; crab; bee; butterfly; ant; spider; "
            "bat; deer; camel; otter; beaver; hedgehog; seal; snail; ladybird; hummingbird; jellyfish; starfish"
        ),
        "country": _list(
            "France; Germany; Italy; Spain; Portugal; Greece; Poland; Sweden; Norway; Finland; Denmark; Ireland; "
            "the United Kingdom; the Netherlands; Belgium; Switzerland; Austria; Hungary; Romania; Ukraine; Russia; "
            "Turkey; Egypt; Morocco; Kenya; Nigeria; Ghana; South Africa; Ethiopia; Tanzania; India; Pakistan; Nepal; "
            "Bangladesh; China; Japan; South Korea; Vietnam; Thailand; Indonesia; Malaysia; the Philippines; "
            "Australia; New Zealand; Canada; the United States; Mexico; Cuba; Jamaica; Brazil; Argentina; Chile; "
            "Peru; Colombia; Venezuela; Ecuador; Iran; Iraq; Israel; Saudi Arabia; Jordan; Iceland; Bulgaria; Serbia; "
            "Croatia; the Czech Republic; Slovakia; Mongolia; Cambodia; Sri Lanka; Uruguay; Bolivia; Algeria; Tunisia"
        ),
        "city": _list(
            "Paris; London; Rome; Berlin; Madrid; Lisbon; Athens; Vienna; Prague; Dublin; Moscow; Istanbul; Cairo; "
            "Nairobi; Mumbai; Delhi; Beijing; Shanghai; Tokyo; Kyoto; Seoul; Bangkok; Singapore; Sydney; Auckland; "
            "Toronto; New York; Chicago; San Francisco; Mexico City; Rio de Janeiro; Buenos Aires; Amsterdam; Venice"
        ),
        "food": _list(
            "bread; pancakes; tomato soup; vegetable curry; pizza; an omelette; apple pie; chocolate cake; lasagna; "
            "fried rice; mashed potatoes; a green salad; chicken soup; banana bread; oatmeal; guacamole; lentil stew; "
            "spaghetti; scrambled eggs; roast vegetables; a smoothie; lemonade; cookies; muffins; a cheese sandwich; "
            "hummus; risotto; tacos; porridge; fruit salad; dumplings; a burger; iced tea; French toast; jam; pickles"
        ),
        "fruit": _list(
            "apple; banana; cherry; strawberry; lemon; lime; grape; orange; pear; plum; blueberry; mango; peach; "
            "tomato; carrot; cucumber; eggplant; pumpkin; potato; onion; broccoli; spinach; corn; coconut"
        ),
        "thing": _list(
            "the sky; grass; snow; blood; the sun; a ripe banana; the sea; coal; milk; a fire truck; chocolate; gold; "
            "an emerald; a ruby; a sunflower; a polar bear; a flamingo; a carrot; a stop sign; a lemon; a raven"
        ),
        "object": _list(
            "umbrella; bicycle; telescope; microscope; clock; camera; guitar; piano; violin; lamp; mirror; ladder; "
            "hammer; kettle; refrigerator; washing machine; compass; candle; pencil; notebook; backpack; suitcase; "
            "bridge; lighthouse; train; sailboat; airplane; hot air balloon; robot; key; letter; map; coin; kite; "
            "drum; blanket; teapot; lantern; snow globe; music box; pocket watch; paintbrush; garden gate; old book"
        ),
        "person": _list(
            "Albert Einstein; Isaac Newton; Marie Curie; Charles Darwin; Galileo Galilei; Leonardo da Vinci; "
            "William Shakespeare; Jane Austen; Mark Twain; Charles Dickens; Leo Tolstoy; Homer; Plato; Socrates; "
            "Aristotle; Alexander the Great; Julius Caesar; Cleopatra; Napoleon Bonaparte; Queen Victoria; "
            "Abraham Lincoln; George Washington; Mahatma Gandhi; Nelson Mandela; Martin Luther King Jr.; Rosa Parks; "
            "Wolfgang Amadeus Mozart; Ludwig van Beethoven; Johann Sebastian Bach; Vincent van Gogh; Pablo Picasso; "
            "Claude Monet; Frida Kahlo; Michelangelo; Thomas Edison; Nikola Tesla; Alexander Graham Bell; "
            "the Wright brothers; Neil Armstrong; Amelia Earhart; Christopher Columbus; Marco Polo; Ada Lovelace; "
            "Alan Turing; Florence Nightingale; Louis Pasteur; Stephen Hawking; Rachel Carson; Joan of Arc"
        ),
        "book": _list(
            "Romeo and Juliet; Hamlet; Macbeth; Pride and Prejudice; Emma; Great Expectations; Oliver Twist; "
            "A Christmas Carol; Moby-Dick; The Adventures of Huckleberry Finn; Alice in Wonderland; Frankenstein; "
            "Dracula; Treasure Island; Robinson Crusoe; Gulliver's Travels; Don Quixote; War and Peace; The Odyssey; "
            "The Iliad; Jane Eyre; Wuthering Heights; Little Women; Around the World in Eighty Days; Peter Pan"
        ),
        "invention": _list(
            "the telephone; the light bulb; the printing press; the steam engine; the airplane; the radio; "
            "the telescope; the internet; the wheel; the compass; the bicycle; the camera; vaccines; the battery; "
            "the microscope; paper; the thermometer; the transistor; the refrigerator; the piano; the elevator"
        ),
        "concept": _list(
            "gravity; photosynthesis; evolution; electricity; magnetism; the water cycle; the food chain; "
            "climate change; inflation; supply and demand; democracy; justice; freedom; friendship; patience; empathy; "
            "a black hole; a galaxy; a solar eclipse; an atom; a molecule; DNA; a cell; the immune system; digestion; "
            "the heart; the brain; sleep; memory; a rainbow; thunder and lightning; an earthquake; a volcano; a tsunami; "
            "the tides; the seasons; erosion; an ecosystem; biodiversity; recycling; renewable energy; solar power; "
            "wind power; an algorithm; a computer; machine learning; encryption; a database; the internet; a browser; "
            "probability; a fraction; a prime number; a triangle; a percentage; an average; the Pythagorean theorem; "
            "a metaphor; a noun; a verb; an adjective; a poem; a fable; an essay; irony; perspective; the Renaissance; "
            "the Industrial Revolution; the Roman Empire; ancient Egypt; the Middle Ages; the French Revolution; "
            "World War I; World War II; the Cold War; the United Nations; a constitution; taxes; interest; a budget; "
            "the stock market; insurance; trade; a vitamin; protein; exercise; stress; meditation; mindfulness; "
            "osmosis; friction; energy; momentum; density; temperature; sound; light; the speed of light; radiation; "
            "the ozone layer; the greenhouse effect; a desert; a rainforest; a glacier; a coral reef; a fossil; a dinosaur"
        ),
        "topic": _list(
            "the ocean; the moon; autumn; winter; spring; summer; a rainy day; the stars; the forest; a river; a garden; "
            "the city at night; home; family; friendship; courage; kindness; hope; time; music; dancing; books; school; "
            "a long journey; the mountains; the desert; a storm; the morning; a lost toy; an old house; a small village; "
            "a birthday; a market; the sea shore; a train ride; snow; a sunset; the wind; flowers; bread; rain; silence; "
            "growing up; saying goodbye; a new beginning; a grandmother; a teacher; a sailor; a farmer; an astronaut; "
            "a painter; a baker; a lonely robot; a brave mouse; a clever fox; a talking tree; a magic key; a dragon"
        ),
        "character": _list(
            "a shy boy; a curious girl; an old fisherman; a young inventor; a tired king; a kind giant; a lost puppy; "
            "a wise owl; a clumsy wizard; a brave knight; a lonely lighthouse keeper; two best friends; a small robot; "
            "a traveling musician; a baker; a detective; a scientist; a little bird; a tiny elephant; a shepherd; "
            "a librarian; a sailor; a clockmaker; a gardener; a grandmother; twin sisters; a street artist; a pilot"
        ),
        "place": _list(
            "a quiet village; the moon; a deep forest; an island; a busy city; an old castle; a train station; "
            "the bottom of the sea; a snowy mountain; a desert; a library; a school; a farm; a space station; "
            "a small bakery; a museum; a harbor; a hidden valley; a hospital; a circus; a garden; a big ship"
        ),
        "skill": _list(
            "play the guitar; play chess; swim; draw; cook; write better essays; speak in public; learn a language; "
            "read faster; save money; sleep better; manage my time; study for an exam; stay motivated; make friends; "
            "train a dog; grow tomatoes; take care of houseplants; take good photographs; write a poem; knit a scarf; "
            "ride a bicycle; run a marathon; prepare for a job interview; write a cover letter; plan a budget; meditate; "
            "learn programming; solve a quadratic equation; memorize vocabulary; tie a tie; fold a paper airplane; "
            "start a blog; plant a tree; reduce waste; eat more healthily; clean a kitchen; pack a suitcase; camp safely; "
            "change a flat tire; remove a coffee stain; sew on a button; set up a tent; organize my desk; plan a trip"
        ),
        "activity": _list(
            "hiking; running; swimming; reading; gardening; cooking; painting; photography; chess; yoga; cycling; "
            "bird watching; camping; fishing; skiing; dancing; singing; writing; knitting; woodworking; volunteering; "
            "traveling; studying; working from home; public speaking; learning a new language; playing the piano"
        ),
        "goal": _list(
            "staying healthy; sleeping better; saving money; learning faster; reducing stress; being more productive; "
            "making new friends; writing clearly; eating well; exercising at home; waking up early; staying focused; "
            "traveling cheaply; protecting the environment; raising a puppy; decorating a small room; giving a speech; "
            "passing an exam; starting a business; keeping a diary; getting along with neighbors; reading more books; "
            "remembering names; using less water; planning a party; working in a team; managing money; cooking quickly"
        ),
        "word": _list(
            "happy; sad; big; small; hot; cold; fast; slow; old; young; light; dark; early; late; easy; difficult; open; "
            "rich; poor; strong; weak; loud; quiet; clean; dirty; full; empty; tall; short; wide; narrow; brave; angry; "
            "beautiful; ugly; noisy; wet; dry; heavy; soft; hard; sweet; bitter; near; far; new; ancient; generous; "
            "polite; lazy; clever; gentle; sharp; smooth; deep; shallow; safe; dangerous; true; public; simple; expensive"
        ),
        "verb": _list(
            "run; walk; eat; drink; sleep; write; read; sing; think; build; break; buy; sell; teach; learn; give; take; "
            "begin; end; speak; listen; win; lose; fly; swim; draw; grow; fall; rise; laugh; cry; push; pull; remember"
        ),
        "noun": _list(
            "child; mouse; foot; tooth; leaf; knife; wolf; man; woman; goose; city; box; story; baby; potato; hero; fish; "
            "sheep; life; shelf; bus; dish; country; penny; wife; loaf; key; monkey; cactus; person"
        ),
        "language": _list(
            "Spanish; French; German; Italian; Portuguese; Dutch; Japanese; Chinese; Russian; Arabic; Hindi; Korean; Latin"
        ),
        "phrase": _list(
            "good morning; thank you; good night; please; how are you; my name is Anna; see you tomorrow; I am hungry; "
            "where is the station; happy birthday; I love you; excuse me; water; friend; house; goodbye"
        ),
        "planet": _list("Mercury; Venus; Earth; Mars; Jupiter; Saturn; Uranus; Neptune; the Moon; the Sun; Pluto"),
        "day": _list("Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday"),
        "month": _list(
            "January; February; March; April; May; June; July; August; September; October; November; December"
        ),
        "group": _list(
            "primary colors; seasons; planets of the solar system; continents; oceans; days of the week; months; vowels; "
            "farm animals; wild animals; sea animals; birds; insects; fruits; vegetables; musical instruments; sports; "
            "kitchen tools; pieces of furniture; kinds of weather; parts of a plant; parts of the body; senses; shapes; "
            "famous painters; classic novels; programming languages; European countries; African countries; Asian rivers; "
            "healthy snacks; board games; professions; school subjects; kinds of trees; flowers; metals; dairy products"
        ),
        "pair": _list(
            "a frog and a toad; a lake and a pond; weather and climate; a planet and a star; a virus and a bacterium; "
            "a simile and a metaphor; an alligator and a crocodile; speed and velocity; mass and weight; a city and a town; "
            "butter and margarine; a novel and a short story; tea and coffee; a violin and a cello; a moth and a butterfly; "
            "cats and dogs; a republic and a monarchy; fiction and nonfiction; rain and snow; a hill and a mountain; "
            "hardware and software; an island and a peninsula; fruits and vegetables; jogging and walking; a debit card "
            "and a credit card; solar energy and wind energy; empathy and sympathy; a compiler and an interpreter"
        ),
        "unit": _list(
            "minutes in an hour; hours in a day; days in a week; days in a year; months in a year; seconds in a minute; "
            "centimeters in a meter; meters in a kilometer; grams in a kilogram; legs on a spider; legs on an insect; "
            "sides in a triangle; sides in a hexagon; players on a soccer team; strings on a violin; letters in the "
            "English alphabet; continents on Earth; planets in the solar system; wheels on a bicycle; weeks in a year; "
            "years in a century; years in a decade; inches in a foot; hearts in an octopus; cards in a deck"
        ),
        "recipient": _list(
            "my boss; a friend; my teacher; a customer; my landlord; a colleague; my neighbor; the city council; "
            "a hotel; an online shop; my team; my grandmother; a librarian; a new coworker; the school; my doctor"
        ),
        "occasion": _list(
            "asking for a day off; saying thank you for a gift; inviting them to dinner; apologizing for being late; "
            "asking about opening hours; canceling a meeting; moving an appointment to next week; asking for help; "
            "congratulating them on a new job; reporting a broken heater; asking for a refund; announcing a picnic; "
            "introducing myself; asking for feedback; confirming a reservation; sharing good news; saying goodbye"
        ),
        "job": _list(
            "teacher; doctor; nurse; firefighter; farmer; pilot; engineer; chef; librarian; scientist; journalist; "
            "architect; carpenter; plumber; electrician; veterinarian; astronaut; lawyer; artist; musician; programmer"
        ),
        "sentence": _list(
            "The cat sat on the warm stone and watched the birds.; She goes to school every day by bus.; "
            "We was late because the train did not come.; He have two brothers and one sister.; "
            "The weather is nice today, so we will go to the park.; I can has a glass of water?; "
            "The old man told a long story about the sea.; They likes to play football after school.; "
            "The meeting was moved to Friday because of the holiday.; My friend she is very kind.; "
            "Please send me the report before noon.; Yesterday I go to the market and buy apples.; "
            "The children built a castle of sand near the water.; It is raining since three days."
        ),
        "passage": _list(
            "Bees live in colonies. Each colony has one queen, many workers and some drones. The workers collect nectar "
            "and pollen from flowers and make honey, which feeds the colony in winter.; "
            "The library will be closed next week for repairs. Books can be returned at the town hall. All loans are "
            "extended by fourteen days, and no fees will be charged.; "
            "Mia wanted a dog for years. Her parents said that a dog is a lot of work. So she walked the neighbor's dog "
            "every day for a summer, in sun and in rain. In the autumn they went to the shelter together.; "
            "Tides are caused by the pull of the moon and the sun on the oceans. When both pull in one line, the tides "
            "are highest. Most coasts see two high tides a day.; "
            "Walking is one of the easiest ways to stay healthy. It needs no equipment, costs nothing and can be done "
            "almost anywhere. Thirty minutes a day strengthen the heart and lift the mood.; "
            "Glass is made mainly of sand. The sand is melted with soda and lime at a very high temperature and shaped "
            "while it is soft. It can be recycled again and again without losing quality.; "
            "The first trains were slow and noisy, but they changed everything. Goods became cheaper, cities grew, and "
            "people who had never left their village could see the sea.; "
            "Tom planted three tomato seeds. He watered them every day, and soon there were small green leaves. One plant "
            "died in a cold night, but the other two gave so many tomatoes that he shared them with the whole street."
        ),
        "greeting": _list(
            "Hello!; Hi there!; Good morning!; Good evening!; Hey, how are you?; Hi, how is it going?; Hello, who are you?; "
            "What can you do?; Nice to meet you!; Thank you so much!; Goodbye!; Can you help me with something?; "
            "I'm feeling a bit sad today.; I'm bored. What should I do?; I had a great day today!; What's your name?; "
            "I can't sleep.; I am nervous about my first day at work.; Tell me something interesting.; Surprise me!; "
            "Good night!; How old are you?; Are you a human?; What do you like to talk about?; I got the job!; "
            "I had an argument with my best friend.; It's my birthday today!; I'm tired of studying.; Hi, I need some advice."
        ),
        "style": _list("short; simple; funny; cheerful; sad; rhyming; quiet; dramatic; warm; silly; hopeful"),
        "audience": _list(
            "a child; a ten-year-old; a beginner; a friend; my grandmother; a student; someone in a hurry"
        ),
        "few": _list("two; three; four; five; six; seven"),
        "painting": _list(
            "The Starry Night; The Scream; Guernica; Girl with a Pearl Earring; The Birth of Venus; The Night Watch; "
            "Sunflowers; The Last Supper; The Kiss; Water Lilies; The Persistence of Memory; American Gothic"
        ),
        "superlative": _list(
            "longest river in the world; largest desert in the world; largest country by area; smallest country; "
            "fastest land animal; largest animal in the world; largest continent; smallest continent; deepest lake; "
            "coldest continent; hottest planet; smallest planet; largest island; hardest natural material; "
            "tallest building in the world; most spoken language; lightest gas; largest bird; slowest animal; "
            "longest wall in the world; largest moon of Saturn; highest waterfall; largest organ of the body"
        ),
        "element": _list(
            "gold; silver; iron; oxygen; hydrogen; carbon; sodium; helium; copper; lead; nitrogen; calcium; zinc; tin; "
            "potassium; mercury; aluminum; sulfur; chlorine; neon; table salt; carbon dioxide"
        ),
        "product": _list(
            "bread; glass; cheese; paper; wine; chocolate; butter; leather; steel; silk; soap; concrete; yogurt; pasta; "
            "a pencil; a candle; a brick; bronze; tofu; sugar; rubber; cotton cloth; a tire; snow; popcorn; beer"
        ),
        "animal_product": _list("milk; eggs; silk; leather; feathers; pearls; bacon; beef; cashmere; beeswax"),
        "body_part": _list(
            "the lungs; the stomach; the kidneys; the brain; the liver; the eyes; the ears; the skin; the bones; the nose; "
            "the tongue; the muscles; the teeth; the blood; the nerves; the spine"
        ),
        "called": _list(
            "a person who flies an airplane; a person who bakes bread; a person who writes books; a doctor for animals; "
            "a place where books are lent; a place where airplanes land; a shape with three sides; a group of wolves; "
            "a shape with four equal sides; a group of fish; water that falls from clouds; a story about one's own life; "
            "the father of your father; the sister of your mother; a word with the same meaning; a house made of snow; "
            "a scientist who studies stars; someone who cuts hair; a vehicle with two wheels; melted rock; solid carbon"
        ),
        "event": _list(
            "did the Second World War end; did the First World War begin; did people first land on the Moon; "
            "did the Berlin Wall fall; was the Declaration of Independence signed; did the Titanic sink; is Christmas; "
            "is Halloween; is New Year's Day; does summer begin; does a leap year happen; is Valentine's Day"
        ),
    }
)

# Questions with a short answer: what is known about a thing, and small sums.
FACT_PATTERNS: tuple[str, ...] = (
    *("What is the capital of {country}?", "Which city is the capital of {country}?", "Where is {country}?"),
    *("What language do people speak in {country}?", "Which continent is {country} in?", "Which country is {city} in?"),
    *("What is the currency of {country}?", "What is {country} famous for?", "What is {city} known for?"),
    *("Name {few} things to see in {city}.", "Tell me about {country}.", "What food is typical of {country}?"),
    *(
        "What color is {thing}?",
        "What colour is {thing}?",
        "What sound does a {animal} make?",
        "What do you call a baby {animal}?",
    ),
    *("What does a {animal} eat?", "Where does a {animal} live?", "How many legs does a {animal} have?"),
    *(
        "Is a {animal} a mammal?",
        "Tell me a fact about the {animal}.",
        "Can a {animal} swim?",
        "How long does a {animal} live?",
    ),
    *("What is the opposite of {word}?", "Give me a synonym for {word}.", 'What does the word "{word}" mean?'),
    *('Use the word "{word}" in a sentence.', 'What is the past tense of "{verb}"?', 'What is the plural of "{noun}"?'),
    *("What rhymes with {word}?", "How do you spell the number {number}?", "What day comes after {day}?"),
    *("What day comes before {day}?", "Which month comes after {month}?", "How many days does {month} have?"),
    *("How many {unit} are there?", "How many {unit}?", "Who was {person}?", "What is {person} famous for?"),
    *("When was {person} born?", "Why is {person} important?", "Tell me about {person} in two sentences."),
    *("Who wrote {book}?", "What is {book} about?", "Who invented {invention}?", "Why was {invention} important?"),
    *("How does {invention} work?", "When was {invention} invented?", "What is {planet}?", "How big is {planet}?"),
    *("Tell me three facts about {planet}.", "Is {planet} a planet?", "Is {fruit} a fruit or a vegetable?"),
    *("What color is a {fruit}?", "Is it healthy to eat {fruit} every day?", "What does a {job} do?"),
    *('How do you say "{phrase}" in {language}?', 'Translate "{phrase}" into {language}.'),
    # arithmetic
    *("What is {number} + {other}?", "What is {number} plus {other}?", "What is {large} - {number}?"),
    *("What is {small} x {small}?", "What is {small} times {number}?", "Calculate {number} minus {small}."),
    *(
        "Is {number} an even number?",
        "What is half of {large}?",
        "What comes after {number}?",
        "Is {number} larger than {other}?",
    ),
    "I have {number} apples and give away {small}. How many are left?",
    "A ticket costs {small} dollars. How much do {number} tickets cost?",
    *("Who painted {painting}?", "What is the {superlative}?", "What is the chemical symbol for {element}?"),
    *("What is {product} made of?", "Which animal gives us {animal_product}?", "What do {body_part} do?"),
    *("What do you call {called}?", "When {event}?", "What is {element} used for?"),
)

PATTERNS: tuple[str, ...] = (
    *FACT_PATTERNS,
    # explanations
    *("What is {concept}?", "What is {concept}?", "Explain {concept}.", "Explain {concept} to {audience}."),
    *("Explain {concept} in simple words.", "Explain {concept} in one sentence.", "Why is {concept} important?"),
    *("How does {concept} work?", "Give me an example of {concept}.", "Can you describe {concept} briefly?"),
    *("What should everyone know about {concept}?", "Write a paragraph about {concept}.", "Teach me about {concept}."),
    *("What is the difference between {pair}?", "Compare {pair}.", "What do {pair} have in common?"),
    # lists and advice
    *("Name {few} {group}.", "List {few} {group}.", "List some {group}.", "Can you name {few} {group}?"),
    *("Give me {few} tips for {goal}.", "What helps with {goal}?", "I need advice on {goal}.", "Any ideas for {goal}?"),
    *(
        "How do I {skill}?",
        "How can I {skill}?",
        "What is the best way to {skill}?",
        "I want to {skill}. Where do I start?",
    ),
    *("Give me step-by-step instructions to {skill}.", "Help me {skill}.", "How long does it take to {skill}?"),
    *("What are the benefits of {activity}?", "Why do people enjoy {activity}?", "What do I need for {activity}?"),
    *("Give me {few} reasons to try {activity}.", "Make a weekly plan for {activity}.", "Is {activity} good for you?"),
    *("How do I make {food}?", "Give me a simple recipe for {food}.", "What ingredients do I need for {food}?"),
    *("What can I cook with {fruit} and {fruit}?", "What goes well with {food}?", "Suggest a dinner for {few} people."),
    *("What should I wear in {month} in {city}?", "Plan a day in {city}.", "Suggest a gift for a {job}."),
    *(
        "What are the pros and cons of {activity}?",
        "How do I become a {job}?",
        "What is a {animal}?",
        "Describe a {animal}.",
    ),
    *("What is a {object} used for?", "Describe a {object}.", "Who uses a {object}, and why?"),
    # stories, poems and other writing
    *("Write a short story about {topic}.", "Write a {style} story about {character} in {place}."),
    *("Tell me a story about {character}.", "Tell me a bedtime story about a {animal} and a {animal}."),
    *("Write a story about {character} who finds a {object}.", "Write a {style} story about a {animal} in {place}."),
    *(
        "Once upon a time there was {character}. Continue the story.",
        "Write the first paragraph of a novel set in {place}.",
    ),
    *("Write a poem about {topic}.", "Write a {style} poem about {topic}.", "Write a haiku about {topic}."),
    *("Write four lines about {topic}.", "Tell me a joke about a {animal}.", "Write a {style} song about {topic}."),
    *("Describe {place} in three sentences.", "Write a dialogue between {character} and {character}."),
    *(
        "Write a fable about a {animal} and a {animal}.",
        "Invent a riddle about a {object}.",
        "Write a slogan for {food}.",
    ),
    *("Write an email to {recipient} {occasion}.", "Write a short letter to {recipient} {occasion}."),
    *("Help me write a polite message to {recipient} {occasion}.", "Draft a note to {recipient} {occasion}."),
    *(
        "Write a diary entry of {character}.",
        "Write a short speech about {topic}.",
        "Write a product description of a {object}.",
    ),
    # work on a given text
    *(
        "Summarize this text: {passage}",
        "Summarize in one sentence: {passage}",
        "{passage}\n\nWhat is this text about?",
    ),
    *("Give this text a title: {passage}", "Rewrite this for a child: {passage}", "List the main points: {passage}"),
    *("Correct the grammar: {sentence}", "Rewrite this sentence: {sentence}", "Make this more polite: {sentence}"),
    *("Is this sentence correct? {sentence}", "Continue: {sentence}"),
    # talk
    *(
        "{greeting}",
        "{greeting}",
        "What do you think about {topic}?",
        "Let's talk about {topic}.",
        "Do you like {activity}?",
    ),
    *("I like {activity}. What about you?", "I have a {animal}. Any advice?", "Recommend a book about {topic}."),
    *("I am going to {city} next week.", "What would you do in {place}?", "Give me a fun question about {topic}."),
)
