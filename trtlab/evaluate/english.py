"""English prose to calibrate and measure a real model with: written for trtlab, under its licence, from no other text.

Three of the texts are held out: nothing calibrates on them.
"""

from __future__ import annotations

CALIBRATION: tuple[str, ...] = (
    "The harbour freezes late in the year, and when it does the fishermen walk out over the ice to cut holes for "
    "their lines. They carry wooden boxes to sit on and small stoves to keep their hands warm. An old rule says that "
    "nobody may walk alone, because a crack that is harmless for two can be the end of one. In the evening they bring "
    "home perch and pike, and the cats of the village seem to know the hour.",
    "Bread needs four things: flour, water, salt and time. The first three are cheap. Mix them in a large bowl until "
    "no dry flour is left, cover the bowl and leave it in a cool room overnight. In the morning the dough will have "
    "doubled in size and will smell faintly of apples. Fold it a few times, shape it into a ball, let it rest for an "
    "hour and bake it in a hot pot with the lid on. Take the lid off for the last fifteen minutes, so that the crust "
    "turns brown.",
    "A bridge carries two kinds of load. The dead load is the weight of the bridge itself, which never changes; the "
    "live load is everything that crosses it, which changes all the time. Engineers design for the heaviest traffic "
    "that they can imagine, add wind, snow and the push of water against the piers, and then multiply the result by a "
    "factor of safety. Most bridges that fall do not fall because somebody calculated badly. They fall because rust "
    "was not seen, or because a river moved the ground under a foundation.",
    "Dear Aunt Margaret, thank you for the parcel, which arrived on Tuesday with only one corner crushed. The scarf "
    "is exactly the right green, and the children have already eaten the ginger biscuits, though I hid the tin on the "
    "top shelf. Thomas has started school and claims that he will be a train driver or a dentist. The garden is a "
    "disaster because of the rain, but the roses do not seem to mind. When will you visit us? The spare room is "
    "ready.",
    "To reset the device, hold the power button for ten seconds until the light turns red. Release the button and "
    "wait. When the light blinks twice, press the button once more. The device will restart with its original "
    "settings, and all saved networks will be removed. If the light stays red for longer than a minute, unplug the "
    "cable, wait for thirty seconds and try again. Do not open the case: there are no parts inside that you can "
    "repair.",
    "When the railway came, the town lost its inns. Until then every carriage between the two cities had stopped "
    "there for the night, and half of the families lived from travellers: they cooked, washed, repaired wheels and "
    "sold oats. In the spring of the first trains the innkeepers laughed at the smoke. By the autumn four of the "
    "seven houses were for sale. The station had been built two miles away, on flat ground, and nobody who arrived "
    "there had any reason to climb the hill.",
    "Why is the sky blue? Sunlight contains all colours. When it passes through the air, it meets molecules that are "
    "much smaller than the wavelength of light, and these scatter short wavelengths far more strongly than long ones. "
    "Blue light is therefore thrown about in every direction, and reaches our eyes from the whole sky. At sunset the "
    "light has a longer way through the air; most of the blue is lost on that way, and what is left looks orange or "
    "red.",
    "The committee met on the third of March. Present were the chair, the treasurer and five members; two members had "
    "sent apologies. The minutes of the last meeting were approved without changes. The treasurer reported that the "
    "roof had cost eleven percent more than planned, and that the difference could be paid from the reserve. A "
    "proposal to raise the yearly fee was discussed at length and postponed. The next meeting will take place in "
    "June.",
    "She had learned to swim in a river, and a river teaches you different things from a pool. It teaches you that "
    "water goes somewhere. You do not fight it; you cross it slowly, at an angle, and you arrive further down than "
    "you started. Years later, in a city with straight streets and crowded stairs, she noticed that she still walked "
    "like that, letting the crowd carry her and steering only a little.",
    "Photosynthesis turns light into chemical energy. In the leaves of a plant, chlorophyll absorbs light, mostly red "
    "and blue, and uses its energy to split water into hydrogen and oxygen. The oxygen escapes into the air. The "
    "hydrogen is combined with carbon dioxide to make sugar, which the plant burns for energy or builds into "
    "cellulose and starch. Nearly all food on Earth, and all coal and oil, began in this way.",
    "The price of a house is not the price of its bricks. It depends on the street, on the school at the end of the "
    "street, on the time that a train takes to the centre, and on what people believe the street will be like in ten "
    "years. Beliefs move faster than bricks. That is why prices can rise by a third in two years although nothing has "
    "been built, and fall again although nothing has been destroyed.",
    "Question: A train leaves at a quarter past nine and arrives at five to eleven. How long does the journey take? "
    "Answer: From a quarter past nine to a quarter past ten is one hour. From a quarter past ten to five to eleven "
    "are forty minutes. The journey takes one hour and forty minutes. Question: How far does the train travel at "
    "ninety kilometres per hour? Answer: One hour and forty minutes is five thirds of an hour, so it travels 150 "
    "kilometres.",
)
HELD_OUT: tuple[str, ...] = (
    "The lighthouse keeper wrote in his book every night for thirty-one years. He wrote down the wind, the height of "
    "the waves and the names of the ships that he recognised. Only rarely did he write about himself. On the day of "
    "his wedding the entry is a single word longer than usual; on the day that his daughter was born it says that the "
    "lamp was lit four minutes late. When the light was made automatic, the harbour office asked him for the books, "
    "because they were the only record of the weather on that coast. He gave them thirty volumes and kept one. Nobody "
    "has ever found out which year it was. His daughter, who inherited the house, says that there is an empty place "
    "on the shelf, and that he used to dust it.",
    "A battery stores energy as a difference. At one electrode there are atoms that would like to give away "
    "electrons; at the other there are atoms that would like to take them. Between the two lies a liquid or a paste "
    "that lets charged atoms through, but not electrons. The electrons must take the long way, through the wire, and "
    "on that way they can light a lamp or turn a motor. When all of the willing atoms have reacted, the battery is "
    "empty. In some batteries the reaction can be reversed: a charger pushes the electrons back, and the difference "
    "is restored. It is never restored completely. With every cycle a little material settles where it cannot be "
    "reached again, and after some hundreds of cycles the battery holds noticeably less than it did when it was new.",
    "Before you paint a wall, look at it in the light of the evening, when the sun comes from the side. Every bump "
    "and every scratch will show. Fill the holes, let the filler dry, and rub it smooth with fine paper. Wash the "
    "wall and wait until the next day. Cover the floor, because paint falls even from a careful brush. Begin with the "
    "edges and the corners, and then fill the surface with a roller, from the top to the bottom, always back into the "
    "part that is still wet. Two thin coats are better than a thick one. Do not judge the colour before it is dry: "
    "nearly all paints become darker, and what looked too bold at noon may be exactly right by night.",
)
