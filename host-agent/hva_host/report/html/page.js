"use strict";
// Draws the maps of guest RAM, and tells the values under the pointer or, by the arrow keys, under a cursor.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  // Which of a cell's dots get which colour: ordered, so that equal shares look equal.
  const BAYER = [0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5].map((place) => (place + 0.5) * 255 / 16);

  function showTip(x, y, title, rows) {
    const body = document.createElement("tbody");
    for (const [name, value] of [[title, ""], ...rows]) {
      const row = body.insertRow();
      const head = document.createElement("th");
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = value;
    }
    const table = document.createElement("table");
    table.append(body);
    tip.replaceChildren(table);
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth > window.innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 12, window.innerHeight - tip.offsetHeight - 4))}px`;
  }

  // The last of the moments that is not after a value, or the first.
  function last(moments, value) {
    let low = 0, high = moments.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (moments[middle] <= value) low = middle; else high = middle;
    }
    return low;
  }

  function nearest(moments, value) {
    const low = last(moments, value), high = Math.min(low + 1, moments.length - 1);
    return value - moments[low] <= moments[high] - value ? low : high;
  }

  function follow(target, box, found, pick, tell, clear) {
    const [begin, end, width] = found.plot;
    const [from, to] = found.time;
    let place = 0;
    target.addEventListener("pointermove", (event) => {
      const rect = box.getBoundingClientRect();
      const x = (event.clientX - rect.left) / rect.width * width;
      const time = from + (x - begin) / (end - begin) * (to - from);
      place = pick(found.at, time);
      tell(place, event.clientX, event.clientY, rect);
    });
    for (const name of ["pointerleave", "blur"]) {
      target.addEventListener(name, () => { tip.hidden = true; clear(); });
    }
    target.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
      if (event.key === "Escape") { tip.hidden = true; clear(); }
      if (step === undefined) return;
      event.preventDefault();
      place = Math.max(0, Math.min(found.at.length - 1, place + step));
      const rect = box.getBoundingClientRect();
      const x = begin + (found.at[place] - from) / (to - from) * (end - begin);
      tell(place, rect.left + x / width * rect.width, rect.top + rect.height / 3, rect);
    });
  }

  for (const [id, found] of Object.entries(data.timelines)) {
    const plot = document.getElementById(id);
    const cursor = plot.querySelector(".cursor");
    const [begin, end] = found.plot, [from, to] = found.time;
    follow(plot, plot, found, nearest, (place, x, y) => {
      const at = begin + (found.at[place] - from) / (to - from) * (end - begin);
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.setAttribute("visibility", "visible");
      const rows = found.columns.map(([name, values]) => [name, values[place].toFixed(1)]);
      showTip(x, y, `at ${found.at[place].toFixed(1)} s, MiB`, rows);
    }, () => cursor.setAttribute("visibility", "hidden"));
  }

  async function inflated(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function colour(name) {
    const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    probe.fillRect(0, 0, 1, 1);
    const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data;
    return (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  }

  const LOOKS = { stable: "resident", volatile: "layer", potential: "preserved", unused: "zero" };

  async function map(id, found) {
    const box = document.querySelector(`[data-map="${id}"]`);
    const canvas = box.querySelector("canvas");
    const shares = { states: await inflated(found.states.shares), residence: await inflated(found.residence.shares) };
    const [begin, end, wide, top, bottom, high] = found.plot;
    canvas.style.left = `${begin / wide * 100}%`;
    canvas.style.width = `${(end - begin) / wide * 100}%`;
    canvas.style.top = `${top / high * 100}%`;
    canvas.style.height = `${(bottom - top) / high * 100}%`;
    let by = "states";

    function draw() {
      const rect = canvas.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      const width = Math.max(1, Math.round(rect.width * ratio)), height = Math.max(1, Math.round(rect.height * ratio));
      canvas.width = width;
      canvas.height = height;
      const context = canvas.getContext("2d");
      const image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer);
      const kinds = found[by].kinds, values = shares[by], cells = found.cells, known = found[by].known;
      const colours = kinds.map(([look]) => colour(LOOKS[look] || look));
      const [from, to] = found.time;
      let frame = 0;
      for (let x = 0; x < width; x++) {
        const time = from + (x + 0.5) / width * (to - from);
        while (frame + 1 < found.at.length && found.at[frame + 1] <= time) frame++;
        if (time < found.at[frame] || (known && !known[frame])) continue;
        for (let y = 0; y < height; y++) {
          const cell = Math.min(cells - 1, Math.floor((height - 1 - y + 0.5) / height * cells));
          const threshold = BAYER[(y & 3) * 4 + (x & 3)];
          let kind = 0, sum = 0;
          for (; kind < kinds.length - 1; kind++) {
            sum += values[(frame * (kinds.length - 1) + kind) * cells + cell];
            if (sum > threshold) break;
          }
          pixels[y * width + x] = colours[kind];
        }
      }
      context.putImageData(image, 0, 0);
      for (const name of ["states", "residence"]) {
        document.querySelector(`[data-legend="${id} ${name}"]`).hidden = name !== by;
      }
    }

    for (const input of document.getElementsByName(`${id}-by`)) {
      input.addEventListener("change", () => { by = input.value; draw(); });
      if (input.checked) by = input.value;
    }
    // A map is shown from its own moment until the next.
    follow(box, box, found, last, (place, x, y, rect) => {
      const up = (bottom - (y - rect.top) / rect.height * high) / (bottom - top);
      const cell = Math.max(0, Math.min(found.cells - 1, Math.floor(up * found.cells)));
      const kinds = found[by].kinds;
      let rest = 255;
      const rows = kinds.map(([, name], kind) => {
        const value = kind < kinds.length - 1 ? shares[by][(place * (kinds.length - 1) + kind) * found.cells + cell] : rest;
        rest -= value;
        return [name, `${Math.round(Math.max(0, value) / 2.55)} %`];
      });
      const size = found.memory / found.cells / 1048576;
      const known = !found[by].known || found[by].known[place];
      const where = `${(cell * size).toFixed(0)} to ${((cell + 1) * size).toFixed(0)} MiB at ${found.at[place].toFixed(1)} s`;
      showTip(x, y, where, known ? rows : [["no scan yet", ""]]);
    }, () => {});
    draw();
    new ResizeObserver(draw).observe(canvas);
    for (const query of ["(prefers-color-scheme: dark)", "print"]) {
      window.matchMedia(query).addEventListener("change", draw);
    }
    window.addEventListener("beforeprint", draw);
  }

  for (const [id, found] of Object.entries(data.maps)) {
    map(id, found).catch((error) => {
      const note = document.createElement("p");
      note.className = "note";
      note.textContent = `This browser can not draw the map (${error.message}); it is in the table below.`;
      document.querySelector(`[data-map="${id}"]`).after(note);
    });
  }
})();
