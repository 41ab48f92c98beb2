// Runs before the page's own script, in a block of its own, to catch its errors. test_page.py
// writes EXPECTED above it.
{
const found = [];
let checks = 0;
const say = text => { if (found.length < 20) found.push(text); };
const same = (a, b, what) => {
  const [x, y] = [JSON.stringify(a), JSON.stringify(b)];
  checks++;
  if (x !== y) say(`${what}: ${x} is not ${y}`);
};
addEventListener("error", event => say("script error: " + event.message));

const byId = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const chips = () => all(".token");
const have = name => chips().map(chip => chip.classList.contains(name));
const texts = selector => all(selector).map(element => element.textContent);
const press = key => {
  const options = { key, bubbles: true, cancelable: true };
  document.body.dispatchEvent(new KeyboardEvent("keydown", options));
};
const change = (id, value, type) => {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event(type, { bubbles: true }));
};
const rgb = name => {
  const value = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
  return value.trim().match(/[0-9a-f]{2}/g).map(x => parseInt(x, 16));
};

// The token j is pointed at: the classes of all tokens against f
const pointedAt = (f, j, what) => {
  same(have("self").indexOf(true), j, what + " self");
  same(have("past"), f.map((_, i) => i < j), what + " past");
  same(have("future"), f.map((_, i) => i > j && i < f[j]), what + " future");
  same(have("sees-it"), f.map((limit, i) => i !== j && limit > j), what + " who sees it");
  same(byId("says").textContent.includes(`: f = ${f[j]}.`), true, what + " says");
};

// The colors in the middle of a matrix's cells: 0 past, 1 future, 2 hidden
const matrix = (mask, f, what) => {
  const canvas = byId(mask + "-matrix"), side = canvas.width / f.length;
  if (side < 6) return;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = ["past", "future", "hidden"].map(rgb);
  const drawn = f.map((_, j) => f.map((_, i) => {
    const at = 4 * (Math.floor((j + .5) * side) * canvas.width + Math.floor((i + .5) * side));
    return colors.findIndex(color => color.every((x, k) => x === pixels[at + k]));
  }));
  const wanted = f.map((limit, j) => f.map((_, i) => {
    if (i >= limit) return 2;
    return i > j ? 1 : 0;
  }));
  same(drawn, wanted, what + " matrix");
};

// All turns of the dialogues: the cache of each, and of the first four what each token sees
const checkDialogues = () => EXPECTED.dialogues.forEach((turns, d) => {
  change("dialogue", d, "change");
  turns.forEach(({ f, lanes }, t) => {
    if (t > 0) byId("on").click();
    all(".strip").forEach((strip, m) => {
      const kinds = ["kept", "again", "read", "written"];
      const counts = kinds.map(kind => strip.querySelectorAll("." + kind).length);
      same(counts, lanes[m], `dialogue ${d}, turn ${t}, cache of mask ${m}`);
    });
    if (d > 3) return;
    Object.keys(f).forEach((mask, m) => {
      const what = `dialogue ${d}, turn ${t}, ${mask}`, step = d > 0 ? 11 : 1;
      all("#masks button")[m].click();
      for (let j = 0; j < f[mask].length; j += step) {
        chips()[j].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        pointedAt(f[mask], j, `${what}, token ${j}`);
      }
      matrix(mask, f[mask], what);
    });
  });
});

const checkKeysAndMouse = () => {
  change("dialogue", 0, "change");
  const last = EXPECTED.dialogues[0].at(-1).f, n = last.ism.length;
  for (const _ of EXPECTED.dialogues[0]) press("n");
  for (const [key, mask] of [["1", "causal"], ["2", "prefix"], ["3", "ism"]]) {
    press(key);
    for (let i = 0; i < n + 3; i++) press("ArrowLeft");
    pointedAt(last[mask], 0, `keys: ${mask}, far left`);
    press("ArrowRight");
    pointedAt(last[mask], 1, `keys: ${mask}, one to the right`);
  }
  const canvas = byId("prefix-matrix"), box = canvas.getBoundingClientRect();
  const place = { clientX: box.left + 1, clientY: box.top + 3.5 * box.height / n };
  canvas.dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse", ...place }));
  pointedAt(last.prefix, 3, "the fourth row of the matrix");
};

const near = (shown, wanted, what) => {
  const close = shown.every((text, i) => Math.abs(parseFloat(text) - wanted[i]) < .4);
  same(shown.length === wanted.length && close, true, `${what} ${shown} ${wanted}`);
};

const checkModel = () => {
  const masks = Object.keys(EXPECTED.dialogues[0][0].f);
  for (const { mask, layer, head, token, attended, next, answer } of EXPECTED.model) {
    press(String(1 + masks.indexOf(mask)));
    change("layer", layer, "change");
    change("head", head, "change");
    chips()[token].click();
    near(texts("#attended td:last-child"), attended, "attention");
    near(texts("#next figure:first-child td:last-child"), next, "next tokens");
    near(texts("#answer td:nth-child(2)"), answer, "the answer");
  }
};

const checkTyped = () => {
  const { lines, tokens, ism } = EXPECTED.typed;
  change("dialogue", EXPECTED.dialogues.length, "change");
  change("typed", lines.join("\n"), "input");
  press("n");
  press("3");
  same(texts(".token"), tokens, "typed tokens");
  chips().forEach((chip, j) => {
    chip.click();
    pointedAt(ism, j, "typed, token " + j);
  });
  if (EXPECTED.model) {
    const { answer, next, reply } = EXPECTED.typed;
    near(texts("#answer td:nth-child(2)"), answer, "the model's typed answer");
    near(texts("#next figure:first-child td:last-child"), next, "what it would say then");
    change("typed", lines[0], "input");
    same(byId("reply").textContent.split("ism: ")[1].trim(), reply.trim(), "its reply");
    return;
  }
  press("4");
  pointedAt(ism, tokens.length - 1, "a mask that the page cannot compute is not chosen");
  const lengths = [["", 0, false], ["one line", 5, false], ["7".repeat(500), 400, true]];
  for (const [text, n, cut] of lengths) {
    change("typed", text, "input");
    same([chips().length, byId("cut").textContent !== ""], [n, cut], "typed " + text);
  }
};

const checkRace = () => {
  const { every, records } = EXPECTED.race;
  const kinds = Object.keys(records[0].curves), panels = all("#curves svg");
  same(panels.length, kinds.length, "a panel for each kind");
  const wanted = [];
  kinds.forEach((kind, k) => {
    const curves = [...panels[k].querySelectorAll(".curve")];
    same(curves.length, records.length, "a curve for each record");
    curves.forEach((path, i) => {
      const heights = path.getAttribute("d").match(/[\d.]+/g).filter((_, at) => at % 2 === 1);
      const shares = heights.map(y => ((158 - y) / 150).toFixed(3));
      same(shares, records[i].curves[kind].map(p => p.toFixed(3)), `curve ${i} of ${kind}`);
    });
  });
  const rows = records[0].curves[kinds[0]].map((_, i) => {
    const cells = records.flatMap(({ curves }) => kinds.map(kind => curves[kind][i]));
    return [String(every * (i + 1)), ...cells.map(p => (100 * p).toFixed(1))];
  });
  const table = all("#curves-table tr").map(row => [...row.children].map(x => x.textContent));
  same(table.slice(1), rows, "the table of the curves");
  const first = records.filter(({ seed }) => seed === records[0].seed);
  const layers = first.flatMap(({ reading }) =>
    reading.looks.map(looks => ({ looks, goals: reading.goals })));
  const lines = all("#readings-table tr");
  same(lines.length, layers[0].looks.length + 1, "rows of the table of the lines");
  all("#readings figure").forEach((figure, i) => {
    const { looks, goals } = layers[i];
    const arcs = [...figure.querySelectorAll(".arc")];
    const drawn = looks.map(([to, weight], j) => [to, weight, j]).filter(look => look[1] > 0);
    same(arcs.map(arc => arc.style.stroke),
      drawn.map(([to, , j]) => to < j ? "var(--past)" : "var(--future)"), `colors, layer ${i}`);
    same(arcs.map(arc => arc.classList.contains("found")),
      drawn.map(([to, , j]) => to === goals[j]), `found, layer ${i}`);
    const count = (ahead, hit) => goals.filter((goal, j) =>
      goal !== null && (goal > j) === ahead && (!hit || looks[j][0] === goal)).length;
    same(figure.querySelector("figcaption").textContent.match(/\d+/g).map(Number),
      [count(false), count(false, true), count(true), count(true, true)], `counts, layer ${i}`);
    lines.slice(1).forEach((line, j) => {
      const [to, weight] = looks[j];
      const cell = line.children[i + 1].textContent;
      same(parseInt(cell), weight > 0 ? to + 1 : NaN, `table of the lines, layer ${i}, row ${j}`);
    });
  });
  same(all("#readings figure").length, layers.length, "a picture for each layer");
  same(byId("goal-says").hidden, false, "what is thick is told");
};

addEventListener("load", () => {
  const own = byId("checked").textContent.startsWith("Checked when it opened: ");
  same(own, true, "the page's own check");
  if (EXPECTED.opens) same([texts(".self"), byId("turn").textContent], EXPECTED.opens, "opens");
  checkDialogues();
  EXPECTED.reusable.forEach(({ before, after, kept }) =>
    same(reusable(before, after), kept, `reusable(${before}, ${after})`));
  checkKeysAndMouse();
  if (EXPECTED.model) checkModel();
  const hidden = all(".with-model").every(element => element.hidden);
  same(hidden, !EXPECTED.model, "the model's part is hidden");
  same(byId("race").hidden, !EXPECTED.race, "the race's part is hidden");
  if (EXPECTED.race) checkRace();
  checkTyped();
  const fits = document.documentElement.scrollWidth <= innerWidth;
  same(fits, true, `nothing is wider than ${innerWidth} pixels`);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const errors = found.length > 0 ? found.join("\n") : "no error";
  const where = `at ${innerWidth} pixels, ${dark ? "dark" : "light"}`;
  parent.postMessage(`${errors} in ${checks} checks ${where}`, "*");
});
}
